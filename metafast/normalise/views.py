"""Views: how a tensor that shares memory is read from its parent, and how a write through it changes the parent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from metafast.graph import Builder, Shape, Value
from metafast.normalise.table import Context


@dataclass(frozen=True)
class View:
    """`get` reads through the view, `put` is the parent after `new` was written through it, `of_tensor` is PyTorch's.

    The base class is the view of everything.
    """

    def get(self, b: Builder, v: Value) -> Value:
        """The view of a Value."""
        return v

    def put(self, c: Context, parent: Value, new: Any) -> Value:
        """The parent's new value."""
        return c.real(new)

    def of_tensor(self, t: Tensor) -> Tensor:
        """The view of a tensor of constants: shares its memory."""
        return t.alias() if hasattr(t, "alias") else t.view(t.shape)


@dataclass(frozen=True)
class Reshape(View):
    """The same elements in another shape."""

    shape: Shape

    def get(self, b: Builder, v: Value) -> Value:
        return b.op("reshape", v, shape=self.shape)

    def put(self, c: Context, parent: Value, new: Any) -> Value:
        return c.reshape(new, parent.shape)

    def of_tensor(self, t: Tensor) -> Tensor:
        return t.view(self.shape)


@dataclass(frozen=True)
class Permute(View):
    """The dims in another order."""

    dims: tuple[int, ...]

    def get(self, b: Builder, v: Value) -> Value:
        return b.op("permute", v, dims=self.dims)

    def put(self, c: Context, parent: Value, new: Any) -> Value:
        return c.permute(new, [self.dims.index(d) for d in range(len(self.dims))])

    def of_tensor(self, t: Tensor) -> Tensor:
        return t.permute(self.dims)


@dataclass(frozen=True)
class Slice(View):
    """start:stop:step along a dim."""

    dim: int
    start: int
    stop: int
    step: int = 1

    def _attrs(self) -> dict[str, int]:
        return {"dim": self.dim, "start": self.start, "stop": self.stop, "step": self.step}

    def get(self, b: Builder, v: Value) -> Value:
        return b.op("slice", v, **self._attrs())

    def put(self, c: Context, parent: Value, new: Any) -> Value:
        size = parent.shape[self.dim]
        if self.step == 1:
            before, after = (c.piece(parent, self.dim, *span) for span in ((0, self.start), (self.stop, size)))
            return c.concat([p for p in (before, c.real(new), after) if p.shape[self.dim]], self.dim)
        inside = torch.zeros([size if d == self.dim else 1 for d in range(len(parent.shape))])
        self.of_tensor(inside).fill_(1.0)
        laid = c("pad", new, size=size, **self._attrs())
        return c("where", inside, laid, parent)

    def of_tensor(self, t: Tensor) -> Tensor:
        return t[(slice(None),) * self.dim + (slice(self.start, self.stop, self.step),)]


@dataclass(frozen=True)
class Expand(View):
    """Broadcast."""

    shape: Shape

    def get(self, b: Builder, v: Value) -> Value:
        return b.op("expand", v, shape=self.shape)

    def put(self, c: Context, parent: Value, new: Any) -> Value:
        if parent.shape == self.shape:
            return c.real(new)
        raise c.refuse("writes through an expanded tensor")

    def of_tensor(self, t: Tensor) -> Tensor:
        return t.expand(self.shape)


@dataclass(frozen=True)
class Diagonal(View):
    """The elements (i, i + offset) of two dims, laid along a new last one."""

    offset: int
    dim1: int
    dim2: int

    def _parts(self, shape: Shape) -> tuple[View, ...]:
        """Both dims as one of rows × columns, of which every (columns + 1)-th element is the diagonal's."""
        rest = [d for d in range(len(shape)) if d not in (self.dim1, self.dim2)]
        rows, columns = shape[self.dim1], shape[self.dim2]
        below, right = max(-self.offset, 0), max(self.offset, 0)
        n = max(min(rows - below, columns - right), 0)
        first, step = below * columns + right, columns + 1
        cut = Slice(len(rest), first, first + (n - 1) * step + 1, step) if n else Slice(len(rest), 0, 0)
        whole = Reshape((*(shape[d] for d in rest), rows * columns))
        return Permute((*rest, self.dim1, self.dim2)), whole, cut

    def get(self, b: Builder, v: Value) -> Value:
        for part in self._parts(v.shape):
            v = part.get(b, v)
        return v

    def put(self, c: Context, parent: Value, new: Any) -> Value:
        parts, held = self._parts(parent.shape), [parent]
        for part in parts:
            held.append(part.get(c.b, held[-1]))
        for part, before in zip(reversed(parts), held[-2::-1], strict=True):
            new = part.put(c, before, new)
        return c.real(new)

    def of_tensor(self, t: Tensor) -> Tensor:
        return t.diagonal(self.offset, self.dim1, self.dim2)


@dataclass(frozen=True)
class Windows(View):
    """Windows of a dim, which may overlap, laid along a new last one; element by element."""

    dim: int
    size: int
    step: int
    shape: Shape

    def get(self, b: Builder, v: Value) -> Value:
        last = (self.shape[self.dim] - 1) * self.step
        cuts = [Slice(self.dim, i, i + last + 1, self.step).get(b, v) for i in range(self.size)]
        parts = [b.op("reshape", cut, shape=(*cut.shape, 1)) for cut in cuts]
        return b.op("concat", *parts, dim=len(v.shape)) if len(parts) > 1 else parts[0]

    def put(self, c: Context, parent: Value, new: Any) -> Value:
        raise c.refuse("writes through windows")

    def of_tensor(self, t: Tensor) -> Tensor:
        return t.unfold(self.dim, self.size, self.step)


def is_constant(b: Builder, v: Value) -> bool:
    """Whether nothing flows back through the value anyway."""
    node = b.producer(v)
    while node is not None and node.op in ("reshape", "permute", "expand", "slice"):
        node = b.producer(node.inputs[0])
    return node is not None and node.op in ("stop_gradient", "const", "literal")


def past_autograd(c: Context, old: Value, new: Value) -> Value:
    """What a tensor holds after a write that autograd did not see: the new value, with the old one's gradient."""
    if is_constant(c.b, old):
        return new
    return c("add", Stop().get(c.b, new), c("sub", old, Stop().get(c.b, old)))


@dataclass(frozen=True)
class Stop(View):
    """`detach`: the same values, without gradient."""

    def get(self, b: Builder, v: Value) -> Value:
        return v if v.dtype != "real" or is_constant(b, v) else b.op("stop_gradient", v)

    def put(self, c: Context, parent: Value, new: Any) -> Value:
        return past_autograd(c, parent, c.real(new))

    def of_tensor(self, t: Tensor) -> Tensor:
        return t.detach()


Chain = tuple[View, ...]
ViewRule = Callable[..., Sequence[Chain]]
_VIEWS: dict[str, ViewRule] = {}


def _view(*names: str) -> Callable[[ViewRule], ViewRule]:
    def enter(f: ViewRule) -> ViewRule:
        _VIEWS.update(dict.fromkeys(names, f))
        return f

    return enter


def views_of(
    c: Context, base: str, shape: Shape, results: Sequence[Shape], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Sequence[Chain]:
    """For each result of a view op, the views that lead there from its argument of that shape."""
    found = _VIEWS.get(base)
    if found is None:
        raise c.refuse("this view has no native form")
    return found(shape, results, *args, **kwargs)


@_view("view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "flatten", "unflatten", "_unsafe_view", "view_as")
def _reshaped(shape: Shape, results: Sequence[Shape], *_: Any, **__: Any) -> list[Chain]:
    return [(Reshape(results[0]),)]


@_view("alias", "lift_fresh", "contiguous")
def _same(shape: Shape, results: Sequence[Shape], *_: Any, **__: Any) -> list[Chain]:
    return [()]


@_view("detach")
def _detached(shape: Shape, results: Sequence[Shape]) -> list[Chain]:
    return [(Stop(),)]


@_view("expand", "expand_as", "broadcast_to")
def _expanded(shape: Shape, results: Sequence[Shape], *_: Any, **__: Any) -> list[Chain]:
    return [(Expand(results[0]),)]


@_view("t")
def _t(shape: Shape, results: Sequence[Shape]) -> list[Chain]:
    return [(Permute((1, 0)),) if len(shape) == 2 else ()]


@_view("transpose", "swapaxes", "swapdims")
def _transposed(shape: Shape, results: Sequence[Shape], dim0: int, dim1: int) -> list[Chain]:
    order = list(range(len(shape)))
    if order:
        order[dim0], order[dim1] = order[dim1], order[dim0]
    return [(Permute(tuple(order)),)]


@_view("permute")
def _permuted(shape: Shape, results: Sequence[Shape], dims: Sequence[int]) -> list[Chain]:
    return [(Permute(tuple(d % len(shape) for d in dims)),)]


@_view("select")
def _selected(shape: Shape, results: Sequence[Shape], dim: int, index: int) -> list[Chain]:
    d = dim % len(shape)
    i = index % shape[d]
    return [(Slice(d, i, i + 1), Reshape(results[0]))]


@_view("slice")
def _sliced(
    shape: Shape,
    results: Sequence[Shape],
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> list[Chain]:
    d = dim % len(shape)
    first, last, _ = slice(start, end, step).indices(shape[d])
    return [(Slice(d, first, max(first, last), step),)]


@_view("narrow")
def _narrowed(shape: Shape, results: Sequence[Shape], dim: int, start: int, length: int) -> list[Chain]:
    d = dim % len(shape)
    first = start % shape[d] if start < 0 else start
    return [(Slice(d, first, first + length),)]


def _cuts(shape: Shape, results: Sequence[Shape], dim: int) -> list[Chain]:
    d = dim % len(shape)
    ends = list(accumulate(r[d] for r in results))
    return [(Slice(d, end - r[d], end),) for end, r in zip(ends, results, strict=True)]


@_view("split", "split_with_sizes", "chunk", "tensor_split")
def _split(shape: Shape, results: Sequence[Shape], _: Any, dim: int = 0) -> list[Chain]:
    return _cuts(shape, results, dim)


@_view("unbind")
def _unbound(shape: Shape, results: Sequence[Shape], dim: int = 0) -> list[Chain]:
    d = dim % len(shape)
    return [(Slice(d, i, i + 1), Reshape(r)) for i, r in enumerate(results)]


@_view("diagonal")
def _diagonal(shape: Shape, results: Sequence[Shape], offset: int = 0, dim1: int = 0, dim2: int = 1) -> list[Chain]:
    rank = len(shape)
    return [(Diagonal(offset, dim1 % rank, dim2 % rank),)]


@_view("unfold")
def _unfolded(shape: Shape, results: Sequence[Shape], dimension: int, size: int, step: int) -> list[Chain]:
    """Windows side by side are a reshape; a 0-dim tensor has one."""
    if not shape or not size:
        return [(Reshape(results[0]),)]
    d = dimension % len(shape)
    if size != step:
        return [(Windows(d, size, step, results[0]),)]
    n = results[0][d]
    order = [i for i in range(len(shape) + 1) if i != d + 1]
    return [(Slice(d, 0, n * size), Reshape((*shape[:d], n, size, *shape[d + 1 :])), Permute((*order, d + 1)))]
