"""Reverse and forward mode over Graph: each walks the nodes once and asks the op table for the rule.

Symbolic zeros (None) never become nodes. The Hessian-vector product of a loss is `push` over the graph that `pull`
wrote: forward over reverse (Pearlmutter 1994; MixFlow-MG, arXiv:2505.00793).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from metafast.graph import Builder, Graph, GraphError, Node, Value, copy_into, live_nodes, same_input
from metafast.ops import TABLE, add_maybe


def depends_on(nodes: Iterable[Node], sources: Iterable[Value]) -> set[Value]:
    """The sources and every value computed from one of them."""
    reached = set(sources)
    for node in nodes:
        if not reached.isdisjoint(node.inputs):
            reached.update(node.outputs)
    return reached


def pull(b: Builder, cotangents: Mapping[Value, Value], wrt: Sequence[Value]) -> list[Value | None]:
    """Reverse mode: the cotangent of each of `wrt`, given those of some values of the graph in `b`; None is zero."""
    nodes = live_nodes(b.nodes, cotangents)
    active = depends_on(nodes, wrt)
    cts: dict[Value, Value] = dict(cotangents)
    for node in reversed(nodes):
        outs = [cts.get(v) for v in node.outputs]
        if all(ct is None for ct in outs) or active.isdisjoint(node.inputs):
            continue
        rule = TABLE[node.op].vjp
        if rule is None:
            raise GraphError(f"{node.op} has no vjp rule")
        b.origin = node.origin
        for v, ct in zip(node.inputs, rule(b, node, *outs), strict=True):
            if ct is not None and v in active:
                cts[v] = ct if v not in cts else b.op("add", cts[v], ct)
    b.origin = ""
    return [cts.get(v) for v in wrt]


def push(b: Builder, tangents: Mapping[Value, Value], of: Sequence[Value]) -> list[Value | None]:
    """Forward mode: the tangent of each of `of`, given tangents of some values of the graph in `b`; None is zero."""
    moving: dict[Value, Value | None] = dict(tangents)
    for node in live_nodes(b.nodes, of):
        ins = [moving.get(v) for v in node.inputs]
        if all(t is None for t in ins):
            continue
        rule = TABLE[node.op].jvp
        if rule is None:
            raise GraphError(f"{node.op} has no jvp rule")
        b.origin = node.origin
        outs = rule(b, node, *ins)
        for v, t in zip(node.outputs, outs, strict=True):
            moving.setdefault(v, t)
    b.origin = ""
    return [moving.get(v) for v in of]


def with_gradient(graph: Graph, output: str, wrt: Sequence[tuple[str, str]]) -> Graph:
    """The graph with outputs "grad/<role>/<name>" = ∂output/∂input added, for a scalar output; absent where zero."""
    b = Builder()
    env = copy_into(b, graph, same_input(b))
    inputs = [v for role, name in wrt if (v := graph.input(role, name)) is not None]
    keys = [(role, name) for role, name in wrt if graph.input(role, name) is not None]
    grads = pull(b, {env[graph.outputs[output]]: b.const(1.0)}, [env[v] for v in inputs])
    outputs = {name: env[v] for name, v in graph.outputs.items()}
    outputs |= {f"grad/{r}/{n}": g for (r, n), g in zip(keys, grads, strict=True) if g is not None}
    return b.finish(outputs)


def vjp_graph(graph: Graph, wrt: Sequence[tuple[str, str]]) -> Graph:
    """The graph of one VJP: inputs of `graph` and ("cotangent", output name); outputs "<role>/<name>" for each of `wrt`
    that gets a cotangent at all."""
    b = Builder()
    env = copy_into(b, graph, same_input(b))
    keys = [k for k in wrt if graph.input(*k) is not None]
    cts: dict[Value, Value] = {}
    for name, v in graph.outputs.items():
        ct = b.input("cotangent", name, v.shape)
        cts[env[v]] = ct if env[v] not in cts else b.op("add", cts[env[v]], ct)
    # An output that *is* an input passes its cotangent straight on: pull seeds both sides with the same table.
    pulled = pull(b, cts, [env[graph.input(*k)] for k in keys])  # type: ignore[index]
    return b.finish({f"{r}/{n}": ct for (r, n), ct in zip(keys, pulled, strict=True) if ct is not None})


__all__ = ["add_maybe", "depends_on", "pull", "push", "vjp_graph", "with_gradient"]
