"""What a step's way back would compute again, and need not: products of `inner` that `meta` reads.

`meta` contains the gradient graph of its step once more. A value of it that `inner` computed from the same inputs can
be kept with the state of the step instead, at the price of memory for every step. Only products are worth that: what is
done element by element costs no more than to read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from metafast.graph import Builder, Graph, Node, Value
from metafast.ops import TABLE, numel
from metafast.sweep import Section, Store

__all__ = ["Kept", "keep"]

Kept = dict[Value, Value]  # a value of meta -> the same of inner

_LEAST_FLOPS = 16  # for each element that is kept


def keep(sections: Mapping[str, Section]) -> tuple[dict[str, Section], int]:
    """The sections with `inner` keeping what `meta` reads, and how many elements a step keeps: 0 where it is nothing.

    >>> # inner: h = x·W ; …           meta: h = x·W ; … h …
    >>> # becomes  h = x·W ; keep 0 = h ; …     … kept 0 …
    """
    inner, meta = sections.get("inner"), sections.get("meta")
    if inner is None or meta is None:
        return dict(sections), 0
    same = _same_values(inner.graph, meta.graph)
    worth = {v for node in meta.graph.nodes if _worth(node) for v in node.outputs if v in same}
    read = _read(meta.graph, worth)
    if not read:
        return dict(sections), 0
    outputs = {f"kept:{n}": same[v] for n, v in enumerate(read)}
    stores = tuple(Store(key, "kept", key.removeprefix("kept:")) for key in outputs)
    kept = replace(inner.graph, outputs={**inner.graph.outputs, **outputs})
    made = {"inner": Section(kept, (*inner.stores, *stores)), "meta": Section(_reading(meta.graph, read), meta.stores)}
    return {**sections, **made}, sum(numel(v.shape) for v in read)


def _worth(node: Node) -> bool:
    out = node.outputs[0]
    return out.dtype == "real" and TABLE[node.op].flops(node) >= _LEAST_FLOPS * numel(out.shape) > 0


def _same_values(inner: Graph, meta: Graph) -> Kept:
    """The values of meta that inner has, too: equal ops of equal inputs."""
    places = {(i.role, i.name): i.value for i in inner.inputs}
    made = {_form(node, node.inputs): node.outputs for node in inner.nodes}
    same = {i.value: v for i in meta.inputs if (v := places.get((i.role, i.name))) is not None}
    for node in meta.nodes:
        if all(v in same for v in node.inputs):
            found = made.get(_form(node, tuple(same[v] for v in node.inputs)))
            if found is not None:
                same.update(zip(node.outputs, found, strict=True))
    return same


def _form(node: Node, inputs: tuple[Value, ...]) -> tuple[object, ...]:
    return node.op, inputs, tuple(sorted(node.attrs.items()))


def _read(graph: Graph, given: set[Value]) -> list[Value]:
    """Which of the given values the outputs need, where these need not be computed, in the graph's order."""
    wanted = set(graph.outputs.values())
    for node in reversed(graph.nodes):
        if any(v in wanted and v not in given for v in node.outputs):
            wanted.update(node.inputs)
    return [v for node in graph.nodes for v in node.outputs if v in wanted and v in given]


def _reading(graph: Graph, kept: Iterable[Value]) -> Graph:
    """The graph with those values as inputs."""
    b = Builder()
    env = {i.value: b.same(i.role, i.name, i.value) for i in graph.inputs}
    given = {v: b.input("kept", str(n), v.shape, v.dtype) for n, v in enumerate(kept)}
    for node in graph.nodes:
        outs = b.again(node, tuple([env[v] for v in node.inputs]))
        env.update((v, given.get(v, out)) for v, out in zip(node.outputs, outs, strict=True))
    return b.finish({name: env[v] for name, v in graph.outputs.items()})
