"""What a step's way back would compute again, and need not: products of `inner` that `meta` reads.

`meta` contains the gradient graph of its step once more, node for node where nothing differs. A product of it that
`inner` has made can be kept with the state of the step instead, at the price of memory for every step. Only products
are worth that: what is done element by element costs no more than to read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from metafast.graph import Input, Node, closed, live_nodes
from metafast.ops import TABLE, numel
from metafast.passes import enabled
from metafast.sweep import Section, Store

__all__ = ["keep"]

_LEAST_FLOPS = 16  # for each element that is kept


def keep(sections: Mapping[str, Section]) -> tuple[dict[str, Section], int]:
    """The sections with `inner` storing what `meta` then reads, and how many elements a step keeps: 0 for nothing."""
    if "inner" not in sections or "meta" not in sections or not enabled("keep"):
        return dict(sections), 0
    inner, meta = sections["inner"], sections["meta"]
    made = set(inner.graph.nodes)
    products = {node for node in meta.graph.nodes if node in made and _worth(node)}
    outputs = meta.graph.outputs
    rest = live_nodes([node for node in meta.graph.nodes if node not in products], outputs.values())
    wanted = {v for node in rest for v in node.inputs}.union(outputs.values())
    values = [v for node in inner.graph.nodes if node in products for v in node.outputs if v in wanted]
    kept = {str(n): v for n, v in enumerate(values)}
    stores = tuple(Store(f"kept:{name}", "kept", name) for name in kept)
    storing = replace(inner.graph, outputs={**inner.graph.outputs, **{f"kept:{name}": v for name, v in kept.items()}})
    reading = closed([*meta.graph.inputs, *(Input("kept", name, v) for name, v in kept.items())], rest, outputs)
    changed = {"inner": Section(storing, (*inner.stores, *stores)), "meta": Section(reading, meta.stores)}
    return {**sections, **changed}, sum(numel(v.shape) for v in kept.values())


def _worth(node: Node) -> bool:
    out = node.outputs[0]
    return out.dtype == "real" and TABLE[node.op].flops(node) >= _LEAST_FLOPS * numel(out.shape) > 0
