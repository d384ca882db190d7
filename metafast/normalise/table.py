"""The table of rules: how each aten op is written in metafast's ops, and what a rule is given to write with.

A rule is called as the aten op was (`rule(c, *args, **kwargs)`, tensors replaced by what they hold) and returns what
the outputs hold. It is found by "base.overload", else by "base". An in-place op has no rule of its own (`add_` is
`add`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from metafast.capture import Call, TensorInfo, Unsupported
from metafast.graph import Builder, Shape, Value
from metafast.ops import numel
from metafast.ops.shape import literal

Rule = Callable[..., Any]
Entered = TypeVar("Entered", bound=Rule)
RULES: dict[str, Rule] = {}


class NeedsReal(Unsupported):
    """An integer input is computed with: it must enter the program as a real."""

    def __init__(self, op: str, origin: object, key: str) -> None:
        self.key = key
        super().__init__(op, origin, f"computes with the integers of {key}")


def rule(*names: str) -> Callable[[Entered], Entered]:
    """Enter a rule under these names."""

    def enter(f: Entered) -> Entered:
        for name in names:
            if name in RULES:
                raise ValueError(f"rule {name!r} is entered twice")
            RULES[name] = f
        return f

    return enter


class Context:
    """What a rule writes with. Calling it writes an op, `c("add", x, 1.0)`, converting numbers and constant tensors."""

    def __init__(self, b: Builder, keys: dict[Value, str]) -> None:
        self.b = b
        self.call: Call
        self.out: list[TensorInfo] = []  # what the run made of the outputs
        self.args: list[TensorInfo | None] = []  # what it knew of the positional arguments
        self.keys = keys  # integer inputs → leaf key
        self.stats: dict[int, tuple[Value, Value]] = {}  # position of a call → batch mean and variance
        self.position = 0

    def __call__(self, op: str, *inputs: Any, **attrs: Any) -> Value:
        return self.b.op(op, *(self.real(x) for x in inputs), **attrs)

    def refuse(self, reason: str) -> Unsupported:
        """The error that says that this call cannot go native."""
        return Unsupported(self.call.op, self.call.origin, reason)

    def real(self, x: Any) -> Value:
        """A real Value: of a number, of a tensor of constants, of a Value that is one."""
        if isinstance(x, Value):
            if x.dtype == "int":
                raise NeedsReal(self.call.op, self.call.origin, self.key_of(x))
            return x
        if isinstance(x, torch.Tensor):
            return self._literal(x)
        if isinstance(x, (bool, int, float)):
            return self.b.const(float(x))
        raise self.refuse(f"takes a {type(x).__name__} where a tensor or a number was expected")

    def _literal(self, x: torch.Tensor) -> Value:
        if x.is_complex():
            raise self.refuse("complex numbers have no native kernels")
        flat = x.detach().reshape(-1)
        if x.dim() and len(flat) and bool((flat == flat[0]).all()):
            return self.b.op("expand", self.b.const(float(flat[0])), shape=tuple(x.shape))
        return literal(self.b, x)

    def key_of(self, x: Value) -> str:
        """The leaf key of the integer input that this value is a view of."""
        while x not in self.keys:
            node = self.b.producer(x)
            assert node is not None, "an int value comes from an input"
            x = node.inputs[0]
        return self.keys[x]

    def shape(self, x: Any) -> Shape:
        """The shape of whatever an argument is."""
        return tuple(x.shape) if isinstance(x, (Value, torch.Tensor)) else ()

    def spread(self, x: Any, shape: Shape) -> Value:
        """Broadcast to a shape."""
        return self("expand", x, shape=tuple(shape))

    def reshape(self, x: Any, shape: Sequence[int]) -> Value:
        """The same elements in another shape; integer labels stay such."""
        v = x if isinstance(x, Value) else self.real(x)
        return self.b.op("reshape", v, shape=tuple(shape))

    def dims(self, x: Any, dims: int | Sequence[int] | None) -> tuple[int, ...]:
        """Dims, counted from the front; None or none at all are all of them."""
        rank = len(self.shape(x))
        if dims is None or (not isinstance(dims, int) and not len(dims)):
            return tuple(range(rank))
        given = (dims,) if isinstance(dims, int) else dims
        return tuple(sorted({d % rank for d in given})) if rank else ()

    def keep(self, v: Value, x: Any, dims: tuple[int, ...], keepdim: bool) -> Value:
        """Give a reduction over `dims` of `x` those dims back with size 1, where asked."""
        if not keepdim:
            return v
        return self.reshape(v, [1 if d in dims else n for d, n in enumerate(self.shape(x))])

    def total(self, x: Any, dims: int | Sequence[int] | None = None, keepdim: bool = False) -> Value:
        """The sum over dims."""
        over = self.dims(x, dims)
        return self.keep(self("sum", x, dims=over), x, over, keepdim)

    def mean(self, x: Any, dims: int | Sequence[int] | None = None, keepdim: bool = False) -> Value:
        """The mean over dims; of nothing, NaN."""
        n = numel(tuple(self.shape(x)[d] for d in self.dims(x, dims)))
        return self("mul", self.total(x, dims, keepdim), 1.0 / n if n else float("nan"))

    def reduce(self, x: Value, reduction: int) -> Value:
        """A loss's reduction: 0 none, 1 mean, 2 sum."""
        return x if reduction == 0 else self.mean(x) if reduction == 1 else self.total(x)

    def safe_sqrt(self, s: Value) -> Value:
        """√s whose derivatives at 0 are 0, as those of norms and standard deviations are."""
        nought = self("eq", s, 0.0)
        return self("where", nought, 0.0, self("sqrt", self("where", nought, 1.0, s)))

    def piece(self, x: Any, dim: int, start: int, stop: int, step: int = 1) -> Value:
        """x[start:stop:step] along a dim."""
        v = x if isinstance(x, Value) else self.real(x)
        return self.b.op("slice", v, dim=dim, start=start, stop=stop, step=step)

    def permute(self, x: Any, dims: Sequence[int]) -> Value:
        """x with its dims in that order."""
        v = x if isinstance(x, Value) else self.real(x)
        return self.b.op("permute", v, dims=tuple(dims))

    def concat(self, parts: Sequence[Any], dim: int) -> Value:
        """Parts side by side along a dim."""
        values = [self.real(p) for p in parts]
        return self.b.op("concat", *values, dim=dim) if len(values) > 1 else values[0]
