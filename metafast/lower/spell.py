"""Spell some nodes out in sums and pointwise ops, where clusters then do it in fewer passes over memory.

A product over a single k is an outer product: a multiplication with broadcasting, which joins the cluster that reads
it. `project`, a normalisation's adjoint, needs two means of v before it can write anything. Where what is kept lies
innermost (the channels of an N,H,W,C batch norm), the cluster that makes v adds both up on the way, and applying them
is a cluster of its own, into which what follows may join: v and x̂ are read once instead of twice. Elsewhere (layer
norm) the rows fit a cache and the kernel stays.
"""

from __future__ import annotations

from collections.abc import Callable

from metafast.graph import Builder, Node, Shape, Value, same_input
from metafast.lower.fuse import is_large
from metafast.ops import numel, scale, spread
from metafast.passes import enabled
from metafast.sweep import Section


def spell(section: Section) -> Section:
    """The section with such nodes replaced."""
    if not enabled("spell") or not any(map(_worth, section.graph.nodes)):
        return section
    b = Builder()
    bind = same_input(b)
    env = {i.value: bind(i) for i in section.graph.inputs}
    producer = section.graph.producers()
    for node in section.graph.nodes:
        inputs = tuple([env[v] for v in node.inputs])
        maker = producer.get(node.inputs[0]) if node.op == "max_pool" else None
        b.origin = node.origin
        if maker is not None and maker.op == "standardize" and _worth(maker):
            y, winners = b.ops("max_pool", env[maker.inputs[0]], *inputs[1:], **node.attrs)
            _, rstd, mean, _ = (env[v] for v in maker.outputs)
            outputs: tuple[Value, ...] = (_standardized(b, maker, y, mean, rstd), winners)
        elif _worth(node):
            outputs = _SPELLED[node.op](b, node, *inputs)
        else:
            outputs = b.again(node, inputs)
        env.update(zip(node.outputs, outputs, strict=True))
    graph = b.finish({name: env[v] for name, v in section.graph.outputs.items()}, keep_inputs=True)
    return Section(graph, section.stores)


def _worth(node: Node) -> bool:
    if node.op not in _SPELLED:
        return False
    if node.op == "standardize" and not (enabled("lazy") and is_large(node.inputs[0].shape)):
        return False
    return _depth(node) == 1 if node.op in _OUTER else _kept_innermost(node)


def _depth(node: Node) -> int:
    """The k that a product adds up over."""
    shape = node.inputs[0].shape
    return shape[-1] if node.op == "matmul" else shape[1]


def _kept_innermost(node: Node) -> bool:
    """Whether the layout that the emitter chooses puts the kept dims last: channels of images, trailing dims else."""
    rank, dims = len(node.inputs[0].shape), node.attrs["dims"]
    kept = [d for d in range(rank) if d not in dims]
    return kept == [1] if rank == 4 else kept == list(range(rank - len(kept), rank)) and bool(kept)


class _Means:
    """Means over the reduced dims, ready to broadcast."""

    def __init__(self, b: Builder, shape: Shape, dims: tuple[int, ...]) -> None:
        self.b, self.shape, self.dims = b, shape, dims
        self.count = numel(tuple(shape[d] for d in dims))

    def mean(self, v: Value) -> Value:
        return scale(self.b, self.b.op("sum", v, dims=self.dims), 1.0 / self.count)

    def wide(self, stat: Value) -> Value:
        return spread(self.b, stat, self.dims, self.shape)


def _standardize(b: Builder, node: Node, x: Value) -> tuple[Value, ...]:
    rstd, mean, var = b.ops("moments", x, **node.attrs)
    return _standardized(b, node, x, mean, rstd), rstd, mean, var


def _standardized(b: Builder, node: Node, x: Value, mean: Value, rstd: Value) -> Value:
    m = _Means(b, x.shape, node.attrs["dims"])
    return b.op("mul", b.op("sub", x, m.wide(mean)), m.wide(rstd))


def _project(b: Builder, node: Node, v: Value, xhat: Value, rstd: Value) -> tuple[Value, ...]:
    m = _Means(b, v.shape, node.attrs["dims"])
    mean, corr = m.mean(v), m.mean(b.op("mul", v, xhat))
    centred = b.op("sub", b.op("sub", v, m.wide(mean)), b.op("mul", xhat, m.wide(corr)))
    return b.op("mul", centred, m.wide(rstd)), corr


def _project_tangent(
    b: Builder, node: Node, v: Value, xhat: Value, xhat_dot: Value, rstd: Value, corr_dot: Value
) -> tuple[Value, ...]:
    """−r·ċ·p − r·(x̂′·m(v x̂) + x̂·m(v x̂′)), p = r·(v − m(v) − x̂·m(v x̂)), with each factor of r on the statistics."""
    m = _Means(b, v.shape, node.attrs["dims"])
    mean, corr, moved = m.mean(v), m.mean(b.op("mul", v, xhat)), m.mean(b.op("mul", v, xhat_dot))
    on_v = b.op("neg", b.op("mul", b.op("square", rstd), corr_dot))
    on_x = b.op("sub", b.op("neg", b.op("mul", rstd, moved)), b.op("mul", on_v, corr))
    on_dot = b.op("neg", b.op("mul", rstd, corr))
    flat = b.op("mul", b.op("sub", v, m.wide(mean)), m.wide(on_v))
    both = b.op("add", b.op("mul", xhat, m.wide(on_x)), b.op("mul", xhat_dot, m.wide(on_dot)))
    return (b.op("add", flat, both),)


def _product(b: Builder, node: Node, x: Value, y: Value) -> tuple[Value, ...]:
    return (b.op("mul", x, y),)


_OUTER = ("matmul", "matmul_lanes")
_SPELLED: dict[str, Callable[..., tuple[Value, ...]]] = {
    "standardize": _standardize,
    "project": _project,
    "project_tangent": _project_tangent,
    **dict.fromkeys(_OUTER, _product),
}
