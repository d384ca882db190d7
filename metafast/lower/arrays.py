"""Where a value lies: a buffer, and a strided view of it. Views of the graph become arithmetic on strides here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from metafast.graph import Attrs, Shape
from metafast.ops import numel

ITEM = {"int": 8, "index": 4}  # "real" is the program's own size

# Address spaces of a program; those from EXTERNAL on are the tensors of the call (csrc/program.hpp).
ARENA, STATE, STATE_NEXT, ADJOINT, ADJOINT_NEXT, ACCUMULATOR, CONSTANT, CALL, CHUNK, EXTERNAL = range(10)

SUM = 2  # the mode of a pointwise output that adds up over its dims of stride 0


@dataclass(eq=False)
class Buffer:
    """A block of memory. `space` None: in the arena, placed by the memory planner, unless `offset` is given."""

    nbytes: int
    space: int | None = None
    offset: int | None = None
    within: tuple[Buffer, int] | None = None  # part of a larger block, so many bytes from its start


@dataclass(frozen=True)
class Array:
    """A strided view; offset and strides count elements."""

    buffer: Buffer
    shape: Shape
    strides: tuple[int, ...]
    itemsize: int
    offset: int = 0

    @property
    def byte_offset(self) -> int:
        return self.offset * self.itemsize


def dense_strides(shape: Shape, order: Sequence[int] | None = None) -> tuple[int, ...]:
    """Strides of a dense array whose dims lie in memory in `order`, outermost first (default: as listed)."""
    strides = [0] * len(shape)
    step = 1
    for d in reversed(range(len(shape)) if order is None else order):
        strides[d] = step
        step *= shape[d]
    return tuple(strides)


def same_strides(shape: Shape, a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two stride lists address alike (a dim of size 1 has no stride to speak of)."""
    return all(x == y for n, x, y in zip(shape, a, b, strict=True) if n > 1)


def memory_order(shape: Shape, strides: Sequence[int]) -> tuple[int, ...]:
    """Dims from outermost to innermost in memory; ties and size-1 dims keep their place."""
    real = [d for d in range(len(shape)) if shape[d] > 1]
    ranked = sorted(real, key=lambda d: -strides[d])
    out, it = [], iter(ranked)
    for d in range(len(shape)):
        out.append(d if shape[d] <= 1 else next(it))
    return tuple(out)


def is_dense(a: Array) -> bool:
    """Whether the view covers a block of memory without gaps or repeats, in some order of dims."""
    return same_strides(a.shape, a.strides, dense_strides(a.shape, memory_order(a.shape, a.strides)))


def lies_in(a: Array, order: Sequence[int]) -> bool:
    """Whether the view is dense with its dims in that order."""
    return same_strides(a.shape, a.strides, dense_strides(a.shape, order))


# ---- views ----------------------------------------------------------------------------------------------------


def viewed(a: Array, shape: Shape, strides: tuple[int, ...], start: int = 0) -> Array:
    """The same memory under another shape, from element `start` on."""
    return Array(a.buffer, shape, strides, a.itemsize, a.offset + start)


def permuted(a: Array, dims: Sequence[int]) -> Array:
    return viewed(a, tuple([a.shape[d] for d in dims]), tuple([a.strides[d] for d in dims]))


def broadcast_to(a: Array, shape: Shape) -> Array:
    lead = len(shape) - len(a.shape)
    return viewed(a, shape, (0,) * lead + tuple([0 if n == 1 else s for n, s in zip(a.shape, a.strides, strict=True)]))


def sliced(a: Array, attrs: Attrs) -> Array:
    d = attrs["dim"]
    size = len(range(attrs["start"], attrs["stop"], attrs["step"]))
    shape = (*a.shape[:d], size, *a.shape[d + 1 :])
    strides = (*a.strides[:d], a.strides[d] * attrs["step"], *a.strides[d + 1 :])
    return viewed(a, shape, strides, attrs["start"] * a.strides[d])


def reshaped(a: Array, shape: Shape) -> Array | None:
    """The view of that shape, or None where strides cannot express it.

    Cut the old dims into runs that are contiguous among themselves; the new dims must fill each run exactly.
    """
    if numel(shape) == 0:
        return viewed(a, shape, dense_strides(shape))
    runs: list[list[int]] = []  # [elements, innermost stride], outermost run first
    for n, s in zip(a.shape, a.strides, strict=True):
        if n == 1:
            continue
        if runs and runs[-1][1] == n * s:
            runs[-1] = [runs[-1][0] * n, s]
        else:
            runs.append([n, s])
    strides = [0] * len(shape)
    left, step = (runs[-1] if runs else [1, 1])
    for d in reversed(range(len(shape))):
        if shape[d] == 1:
            strides[d] = step
            continue
        if left == 1 and runs:
            runs.pop()
            left, step = runs[-1] if runs else [1, 1]
        if left % shape[d]:
            return None
        strides[d] = step
        step, left = step * shape[d], left // shape[d]
    return viewed(a, shape, tuple(strides))


def collapse(shape: Shape, strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """Merge neighbouring dims that every operand walks as one; drop dims of size 1. Returns (dims, strides)."""
    dims: list[int] = []
    columns: list[list[int]] = []  # the strides of all operands along each of them
    last: list[int] = []
    for d, n in enumerate(shape):
        if n == 1:
            continue
        steps = [s[d] for s in strides]
        if dims and [s * n for s in steps] == last:
            dims[-1] *= n
            columns[-1] = steps
        else:
            dims.append(n)
            columns.append(steps)
        last = steps
    return dims, [list(each) for each in zip(*columns, strict=True)] or [[] for _ in strides]


@dataclass(eq=False)
class Instruction:
    """One kernel call before addresses are known: operands in the kernel's order, which of them are written.

    `chunks` stands for `members`, has all their operands, and `strides` has the bytes each moves from chunk to chunk.
    """

    kernel: str
    operands: list[Array]
    writes: list[int]
    ints: list[int]
    floats: list[float] = field(default_factory=list)
    flops: float = 0.0
    note: str = ""
    members: list[Instruction] = field(default_factory=list)
    strides: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Pointwise:
    """What the ints of a pointwise instruction say: csrc/kernels/common/kernels.hpp has their order."""

    inputs: int
    dims: list[int]
    strides: list[list[int]]  # of each operand, inputs first
    registers: list[int]  # of each output, as are the modes
    modes: list[int]

    @staticmethod
    def of(ins: Instruction) -> Pointwise:
        rank, n_in, n_out = ins.ints[:3]
        at = 5 + rank
        strides = [ins.ints[at + k * rank :][:rank] for k in range(n_in + n_out)]
        at += (n_in + n_out) * rank
        return Pointwise(n_in, ins.ints[5 : 5 + rank], strides, ins.ints[at:][:n_out], ins.ints[at + n_out :][:n_out])


def added_up(parts: Array, out: Array, mode: int, note: str, flops: float = 0.0) -> Instruction:
    """out (+)= the sum of dense parts, (how many, elements of out)."""
    many, elements = parts.shape[0], numel(out.shape)
    ints = [1, 1, elements, many, 1, elements, 1, mode, 0]
    return Instruction("reduce", [parts, out], [1], ints, [1.0], flops, note)
