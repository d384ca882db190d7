"""The record of an op, and the one table of them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from metafast.graph import TABLE, Attrs, Builder, Node, Shape, Value

Spec = tuple[Shape, str]
Infer = Callable[[Sequence[Value], Attrs], tuple[Spec, ...]]
Evaluate = Callable[[list[torch.Tensor], Attrs], tuple[torch.Tensor, ...]]
Rule = Callable[..., Sequence["Value | None"]]
Simplify = Callable[[Builder, tuple[Value, ...], dict[str, Any]], "Value | None"]


@dataclass(frozen=True)
class Error:
    """How far one form of a native kernel may be off in any element: |ŷ − y| ≤ roundings(n)·u·m, to first order in u.

    `n` is how many terms an element sums, `u` the unit roundoff of the dtype, and `m` what `of` says: of "element" the
    sum of the magnitudes of its own terms, of "array" the greatest such sum of any element, of "operands" the greatest
    magnitude in the first operand times the greatest sum of magnitudes that an element meets of the second. `source`
    says why.
    """

    roundings: Callable[[int], float]
    of: str
    source: str

    def bound(self, n: int, u: float, magnitude: torch.Tensor) -> torch.Tensor:
        """Of each element, from the sums of magnitudes (what the op makes of its operands' magnitudes)."""
        m = magnitude if self.of == "element" or not magnitude.numel() else magnitude.max().expand(magnitude.shape)
        return self.roundings(n) * u * m


@dataclass(frozen=True)
class Op:
    """One op: everything the pipeline asks of it.

    `vjp(b, node, *cotangents)` returns one cotangent an input, `jvp(b, node, *tangents)` one tangent an output; None is
    a symbolic zero on both sides. A missing rule means that no pass differentiates the op (it appears only in
    tangents).
    `bound` is the float32 error of the native kernel relative to the largest magnitude of the exact result, and what
    the tests of graphs assert; `errors` holds what the tests of kernels assert of each form, where an op sums products.
    `kernel` is the native stem: the lowering has one emitter of that name.
    """

    name: str
    infer: Infer
    evaluate: Evaluate
    kernel: str
    vjp: Rule | None = None
    jvp: Rule | None = None
    simplify: Simplify | None = None
    flops: Callable[[Node], float] = lambda node: float(sum(numel(v.shape) for v in node.outputs))
    bound: float = 2e-6
    errors: Mapping[str, Error] = field(default_factory=dict)


def register(op: Op) -> Op:
    """Add a row."""
    if op.name in TABLE:
        raise ValueError(f"op {op.name!r} is registered twice")
    TABLE[op.name] = op
    return op


def numel(shape: Shape) -> int:
    """How many elements."""
    return math.prod(shape)


@functools.lru_cache(4096)  # every node is inferred when it is made and when its graph is verified
def broadcast(*shapes: Shape) -> Shape:
    """The NumPy broadcast of the shapes; raises ValueError where they do not fit."""
    rank = max(map(len, shapes))
    out = []
    for d in range(rank):
        sizes = {s[d - rank + len(s)] for s in shapes if d - rank + len(s) >= 0} - {1}
        if len(sizes) > 1:
            raise ValueError(f"shapes {shapes} do not broadcast")
        out.append(sizes.pop() if sizes else 1)
    return tuple(out)


def add_maybe(b: Builder, x: Value | None, y: Value | None) -> Value | None:
    """x + y, where None is zero."""
    if x is None or y is None:
        return y if x is None else x
    return b.op("add", x, y)


def sum_to(b: Builder, v: Value, shape: Shape) -> Value:
    """Sum out what broadcasting `shape` to `v.shape` repeated: the adjoint of that broadcast."""
    if v.shape == shape:
        return v
    lead = len(v.shape) - len(shape)
    dims = tuple(range(lead)) + tuple(
        d + lead for d, n in enumerate(shape) if n == 1 and v.shape[d + lead] != 1
    )
    if dims:
        v = b.op("sum", v, dims=dims)
    return b.op("reshape", v, shape=shape)


def spread(b: Builder, stat: Value, dims: tuple[int, ...], shape: Shape) -> Value:
    """Undo a reduction over `dims`: give the statistic those dims back with size 1, ready to broadcast to `shape`."""
    return b.op("reshape", stat, shape=tuple(1 if d in dims else n for d, n in enumerate(shape)))


def scale(b: Builder, v: Value, factor: float) -> Value:
    """v · factor."""
    return b.op("mul", v, b.const(factor))
