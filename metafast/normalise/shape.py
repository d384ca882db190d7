"""Rules for copies, casts, joins, choice of elements by constant indices, and sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch

from metafast.graph import Value
from metafast.normalise.table import Context, rule
from metafast.normalise.views import Diagonal
from metafast.ops import numel

_NO_LABEL = -(2**40)  # ignores nothing that is a label
_PIECES = 256  # a choice of elements that falls into more runs than this is not written as slices

# ---- copies and casts -----------------------------------------------------------------------------------------


@rule("clone", "contiguous", "alias", "lift_fresh", "native_dropout_eval")
def _identity(c: Context, x: Any, **_: Any) -> Any:
    return x if isinstance(x, Value) else c.real(x)


@rule("_unsafe_view", "view", "reshape", "_reshape_copy", "view_copy")
def _reshape(c: Context, x: Any, *_: Any, **__: Any) -> Value:
    return c.reshape(x, c.out[0].shape)


@rule("_to_copy")
def _cast(c: Context, x: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Any:
    source = c.args[0].dtype if c.args and c.args[0] is not None else c.out[0].dtype
    target = c.out[0].dtype
    if target == torch.bool and source != torch.bool:
        return c("ne", x, 0.0)
    if target.is_floating_point:
        return c.real(x)
    if source.is_floating_point:
        raise c.refuse("a cast of reals to integers has no native form")
    return _identity(c, x)  # labels stay labels


@rule("copy")
def _copy(c: Context, x: Any, source: Any, non_blocking: bool = False) -> Value:
    if c.out[0].dtype == torch.bool and c.args[1] is not None and c.args[1].dtype != torch.bool:
        return c("ne", source, 0.0)
    if not c.out[0].dtype.is_floating_point and c.args[1] is not None and c.args[1].dtype.is_floating_point:
        raise c.refuse("a cast of reals to integers has no native form")
    return c.spread(source, c.out[0].shape)


@rule("fill")
def _fill(c: Context, x: Any, value: Any) -> Value:
    return c.spread(value, c.out[0].shape)


def _enter_filled(name: str, value: float | None, at: int = -1) -> None:
    """Factories that read a tensor for its shape only; `at` is where the value stands among the arguments."""

    @rule(name)
    def filled(c: Context, *args: Any, **kwargs: Any) -> torch.Tensor:
        out = c.out[0]
        number = args[at] if value is None else value
        return torch.full(out.shape, number, dtype=out.dtype)


for _name, _value in {"zeros_like": 0, "ones_like": 1, "empty_like": 0, "zero": 0}.items():
    _enter_filled(_name, _value)
for _name, _value in {"new_zeros": 0, "new_ones": 1, "new_empty": 0, "new_empty_strided": 0}.items():
    _enter_filled(_name, _value)
_enter_filled("full_like", None, 1)
_enter_filled("new_full", None, 2)

# ---- joins and repetition -------------------------------------------------------------------------------------


@rule("cat", "concat", "concatenate")
def _cat(c: Context, tensors: Sequence[Any], dim: int = 0) -> Value:
    parts = [t for t in tensors if c.shape(t) != (0,)] or tensors[:1]
    return c.concat(parts, dim % max(len(c.shape(parts[0])), 1))


@rule("stack")
def _stack(c: Context, tensors: Sequence[Any], dim: int = 0) -> Value:
    d = dim % len(c.out[0].shape)
    shape = tuple(1 if i == d else n for i, n in enumerate(c.out[0].shape))
    return c.concat([c.reshape(c.real(t), shape) for t in tensors], d)


@rule("unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk")
def _split(c: Context, x: Any, _: Any, dim: int = 0) -> list[Value]:
    d = dim % len(c.shape(x))
    ends = list(accumulate(out.shape[d] for out in c.out))
    return [c.piece(x, d, end - out.shape[d], end) for end, out in zip(ends, c.out, strict=True)]


@rule("pixel_shuffle")
def _pixel_shuffle(c: Context, x: Any, factor: int) -> Value:
    *batch, channels, height, width = c.shape(x)
    n = len(batch)
    v = c.reshape(x, (*batch, channels // factor**2, factor, factor, height, width))
    return c.reshape(c.permute(v, [*range(n), n, n + 3, n + 1, n + 4, n + 2]), c.out[0].shape)


@rule("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(c: Context, x: Any, groups: int) -> Value:
    n, channels, *size = c.shape(x)
    v = c.reshape(x, (n, groups, channels // groups, *size))
    return c.reshape(c.permute(v, [0, 2, 1, *range(3, len(size) + 3)]), c.shape(x))


@rule("upsample_nearest1d", "upsample_nearest2d")
def _upsample_nearest(c: Context, x: Any, output_size: Any, *scales: float | None) -> Value:
    """Each element many times, where the picture grows by whole factors."""
    shape, out = c.shape(x), c.out[0].shape
    grown = zip(scales, shape[2:], out[2:], strict=False)
    if any(b % a for a, b in zip(shape, out, strict=True)) or any(s not in (None, b / a) for s, a, b in grown):
        raise c.refuse(f"interpolation from {shape[2:]} to {out[2:]}, no multiple of it, has no native form")
    v = c.reshape(x, [n for a in shape for n in (a, 1)])
    return c.reshape(c.spread(v, tuple(n for a, b in zip(shape, out, strict=True) for n in (a, b // a))), out)


@rule("repeat")
def _repeat(c: Context, x: Any, repeats: Sequence[int]) -> Value:
    shape = (1,) * (len(repeats) - len(c.shape(x))) + c.shape(x)
    v = c.reshape(c.real(x), [n for size in shape for n in (1, size)])
    v = c.spread(v, tuple(n for r, size in zip(repeats, shape, strict=True) for n in (r, size)))
    return c.reshape(v, c.out[0].shape)


@rule("constant_pad_nd")
def _pad(c: Context, x: Any, pad: Sequence[int], value: float = 0) -> Value:
    v = c.real(x)
    rank = len(v.shape)
    for i in range(len(pad) // 2):
        d = rank - 1 - i
        before, after = pad[2 * i], pad[2 * i + 1]
        v = c.piece(v, d, max(-before, 0), v.shape[d] - max(-after, 0))
        sides = [c.spread(value, (*v.shape[:d], max(n, 0), *v.shape[d + 1 :])) for n in (before, after)]
        v = c.concat([p for p in (sides[0], v, sides[1]) if p.shape[d]] or [v], d)
    return v


def _enter_padded(name: str, index: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
    """Padding by elements of the array itself: `index` says which lies at each place, counted from before its start."""

    @rule(*(f"{name}_pad{rank}d" for rank in (1, 2, 3)))
    def padded(c: Context, x: Any, pad: Sequence[int]) -> Value:
        v = c.real(x)
        for i, (before, after) in enumerate(zip(pad[::2], pad[1::2], strict=True)):
            d = len(v.shape) - 1 - i
            v = choose(c, v, d, index(torch.arange(-before, v.shape[d] + after), v.shape[d]))
        return v


_enter_padded("replication", lambda at, n: at.clamp(0, n - 1))
_enter_padded("reflection", lambda at, n: n - 1 - (n - 1 - at.abs()).abs())

# ---- elements by index ----------------------------------------------------------------------------------------


def _runs(index: Sequence[int]) -> list[tuple[int, int, int]]:
    """The index as few slices (start, stop, step), step ≥ 1, in order."""
    runs: list[tuple[int, int, int]] = []
    i = 0
    while i < len(index):
        step = index[i + 1] - index[i] if i + 1 < len(index) else 1
        if step < 1:
            step = 1
        j = i + 1
        while j < len(index) and index[j] - index[j - 1] == step:
            j += 1
        runs.append((index[i], index[j - 1] + 1, step if j - i > 1 else 1))
        i = j
    return runs


def choose(c: Context, x: Any, dim: int, index: torch.Tensor) -> Value:
    """x.index_select(dim, index) for a constant index, as slices side by side."""
    v = c.real(x)
    d = dim % len(v.shape)
    wanted = [i % v.shape[d] for i in index.reshape(-1).tolist()]
    runs = _runs(wanted)
    if len(runs) > _PIECES:
        raise c.refuse(f"an index of {len(wanted)} elements in no order has no native form")
    if not runs:
        return c.piece(v, d, 0, 0)
    return c.concat([c.piece(v, d, *run) for run in runs], d)


def pick(c: Context, x: Any, labels: Value, *, wraps: bool = False) -> Value:
    """x[n, labels[n]] for x (N, C)."""
    chosen = c("where", one_hot(c, labels, c.shape(x)[1], None, wraps=wraps), x, 0.0)
    return c.total(chosen, 1)


def one_hot(c: Context, labels: Any, classes: int, ignore_index: int | None, *, wraps: bool = False) -> Value:
    """(N, classes), 1 at each label and a row of 0 where it is `ignore_index`; labels are checked at run time.

    With `wraps` a label below 0 counts from the end, as an index does.
    """
    v = labels if isinstance(labels, Value) else c.real(labels)
    ignored = _NO_LABEL if ignore_index is None else ignore_index
    return c.b.op("one_hot", v, classes=classes, ignore_index=ignored, wraps=wraps)


@rule("one_hot")
def _one_hot(c: Context, labels: Any, num_classes: int = -1) -> Value:
    shape = c.shape(labels)
    return c.reshape(one_hot(c, c.reshape(labels, (numel(shape),)), num_classes, None), (*shape, num_classes))


@rule("index_select")
def _index_select(c: Context, x: Any, dim: int, index: Any) -> Value:
    if not isinstance(index, torch.Tensor):
        raise c.refuse("the index depends on the data")
    return choose(c, x, dim, index)


@rule("index.Tensor")
def _index(c: Context, x: Any, indices: Sequence[Any]) -> Value:
    used = [(d, i) for d, i in enumerate(indices) if i is not None]
    if len(used) == 1 and isinstance(used[0][1], torch.Tensor):
        d, index = used[0]
        if index.dtype in (torch.bool, torch.uint8):
            if index.dim() != 1:
                raise c.refuse("a mask over several dims has no native form")
            index = index.nonzero()[:, 0]
        return c.reshape(choose(c, x, d, index), c.out[0].shape)
    rows_labels = [i for _, i in used]
    if len(c.shape(x)) == 2 and len(used) == 2 and isinstance(rows_labels[0], torch.Tensor):
        rows, labels = rows_labels
        if isinstance(labels, Value) and rows.dim() == 1 and torch.equal(rows, torch.arange(labels.shape[0])):
            return pick(c, c.piece(x, 0, 0, len(rows)), labels, wraps=True)
    if all(isinstance(i, torch.Tensor) and i.dtype not in (torch.bool, torch.uint8) for i in rows_labels):
        return c.reshape(_points(c, x, [d for d, _ in used], rows_labels), c.out[0].shape)
    raise c.refuse("the index depends on the data, or is a mask beside another index")


def _points(c: Context, x: Any, dims: Sequence[int], indices: Sequence[torch.Tensor]) -> Value:
    """x indexed by constants along several dims: these as one dim, in place where they are neighbours, else first."""
    shape = c.shape(x)
    at = dims[0] if dims[-1] - dims[0] == len(dims) - 1 else 0
    rest = [d for d in range(len(shape)) if d not in dims]
    v = c.permute(c.real(x), [*rest[:at], *dims, *rest[at:]])
    flat = torch.zeros((), dtype=torch.long)
    for d, i in zip(dims, indices, strict=True):
        flat = flat * shape[d] + i % shape[d]
    sizes = [shape[d] for d in rest]
    v = c.reshape(v, (*sizes[:at], numel(tuple(shape[d] for d in dims)), *sizes[at:]))
    return choose(c, v, at, flat)


@rule("gather")
def _gather(c: Context, x: Any, dim: int, index: Any, *, sparse_grad: bool = False) -> Value:
    shape, want = c.shape(x), c.shape(index)
    if isinstance(index, Value) and len(shape) == 2 and dim % 2 == 1 and want == (shape[0], 1):
        return c.reshape(pick(c, x, c.reshape(index, (shape[0],))), want)
    if isinstance(index, Value) and len(shape) == 1 and len(want) == 1:
        return c.total(c("where", one_hot(c, index, shape[0], None), x, 0.0), 1)
    if isinstance(index, torch.Tensor) and shape:
        every = torch.meshgrid(*(torch.arange(n) for n in want), indexing="ij")
        along = [index if d == dim % len(shape) else i for d, i in enumerate(every)]
        return c.reshape(_points(c, x, range(len(shape)), along), want)
    raise c.refuse("a gather with this index has no native form")


@rule("flip")
def _flip(c: Context, x: Any, dims: Sequence[int]) -> Value:
    v = c.real(x)
    for d in dims:
        v = choose(c, v, d, torch.arange(v.shape[d] - 1, -1, -1))
    return v


@rule("roll")
def _roll(c: Context, x: Any, shifts: Sequence[int], dims: Sequence[int] = ()) -> Value:
    v = c.real(x) if dims else c.reshape(c.real(x), (numel(c.shape(x)),))
    for shift, d in zip(shifts, dims or (0,), strict=True):
        v = choose(c, v, d, torch.arange(v.shape[d]).roll(shift))
    return c.reshape(v, c.shape(x))


@rule("trace", "diagonal_copy")
def _diagonal(c: Context, x: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Value:
    rank = len(c.shape(x))
    diagonal = Diagonal(offset, dim1 % rank, dim2 % rank).get(c.b, c.real(x))
    return diagonal if c.out[0].shape else c.total(diagonal)


@rule("tril")
def _tril(c: Context, x: Any, diagonal: int = 0) -> Value:
    return c("where", torch.ones(c.shape(x)[-2:]).tril(diagonal), x, 0.0)


@rule("triu")
def _triu(c: Context, x: Any, diagonal: int = 0) -> Value:
    return c("where", torch.ones(c.shape(x)[-2:]).triu(diagonal), x, 0.0)


# ---- sums -----------------------------------------------------------------------------------------------------


@rule("sum")
def _sum(c: Context, x: Any, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    return c.total(x, dim, keepdim)


@rule("cumsum")
def _cumsum(c: Context, x: Any, dim: int, *, dtype: Any = None) -> Value:
    rank = len(c.shape(x))
    return c("cumsum", x, dim=dim % rank, reverse=False) if rank else c.real(x)


@rule("mean")
def _mean(c: Context, x: Any, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    return c.mean(x, dim, keepdim)


def _moments(c: Context, x: Any, dim: Any, correction: float | None, keepdim: bool) -> tuple[Value, Value]:
    """Variance and mean over dims."""
    dims = c.dims(x, dim)
    n = numel(tuple(c.shape(x)[d] for d in dims))
    mean = c.mean(x, dims, keepdim=True)
    freedom = max(n - (1 if correction is None else correction), 0.0)
    squares = c.total(c("square", c("sub", x, mean)), dims, keepdim)
    var = c("mul", squares, 1.0 / freedom if freedom else math.inf)
    return var, mean if keepdim else c.reshape(mean, var.shape)


@rule("var.correction")
def _var(c: Context, x: Any, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Value:
    return _moments(c, x, dim, correction, keepdim)[0]


@rule("std.correction")
def _std(c: Context, x: Any, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Value:
    return c.safe_sqrt(_moments(c, x, dim, correction, keepdim)[0])


@rule("var_mean.correction")
def _var_mean(
    c: Context, x: Any, dim: Any = None, *, correction: Any = None, keepdim: bool = False
) -> tuple[Value, Value]:
    return _moments(c, x, dim, correction, keepdim)


@rule("std_mean.correction")
def _std_mean(
    c: Context, x: Any, dim: Any = None, *, correction: Any = None, keepdim: bool = False
) -> tuple[Value, Value]:
    var, mean = _moments(c, x, dim, correction, keepdim)
    return c.safe_sqrt(var), mean


@rule("linalg_vector_norm")
def _vector_norm(
    c: Context, x: Any, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Value:
    if abs(ord) == math.inf:
        over, sign = c.dims(x, dim), math.copysign(1.0, ord)
        return c.keep(c("mul", c("amax", c("mul", c("abs", x), sign), dims=over), sign), x, over, keepdim)
    if ord == 1:
        return c.total(c("abs", x), dim, keepdim)
    if ord != 2:
        raise c.refuse(f"the norm of order {ord} has no native form")
    return c.safe_sqrt(c.total(c("square", x), dim, keepdim))


@rule("_foreach_norm")
def _norms(c: Context, tensors: Sequence[Any], ord: float = 2, dtype: Any = None) -> list[Value]:
    return [_vector_norm(c, x, ord) for x in tensors]


@rule("norm")
def _norm(c: Context, x: Any, p: float | None = 2, dim: Any = None, keepdim: bool = False, **_: Any) -> Value:
    return _vector_norm(c, x, 2 if p is None else p, dim, keepdim)


@rule("logsumexp")
def _logsumexp(c: Context, x: Any, dim: Sequence[int], keepdim: bool = False) -> Value:
    """Σ p·(x − log p) with p = softmax x: exact where p weighs, and Σ dp = 0 makes its derivatives logsumexp's."""
    dims = c.dims(x, dim)
    kept = [d for d in range(len(c.shape(x))) if d not in dims]
    rows = tuple(c.shape(x)[d] for d in kept)
    v = c.reshape(c.permute(x, [*kept, *dims]), (*rows, numel(c.shape(x)) // max(numel(rows), 1)))
    logs = c("log_softmax", v, dim=len(rows))
    p = c("exp", logs)
    gap = c("where", c("eq", p, 0.0), 0.0, c("sub", v, logs))
    return c.keep(c.total(c("mul", p, gap), (len(rows),)), x, dims, keepdim)
