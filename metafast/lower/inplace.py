"""What an instruction writes in the place of what it reads: memory that is read last where it is written again.

A store to memory that no cache holds near fetches it first, and drives something else out; over what was just read it
does neither. Kernels say what may lie over what (csrc/kernels/cpu/): an output of elementwise operations over an input
that is walked alike, a product over what it is added to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from metafast.lower.arrays import Array, Buffer, Instruction, Pointwise

__all__ = ["heirs", "over_current"]


def heirs(code: Sequence[Instruction], life: dict[Buffer, tuple[int, int]]) -> dict[Buffer, Buffer]:
    """Buffers of the arena that take over that of an operand which is read last where they are first written.

    `life` is first and last instruction that touch each buffer, and grows by that of its heirs.
    """
    found: dict[Buffer, Buffer] = {}
    parts = {a.buffer.within[0] for ins in code for a in ins.operands if a.buffer.within is not None}
    for k, ins in enumerate(code):
        taken: set[Buffer] = set()
        for w, r in _overlays(ins):
            new, old = ins.operands[w].buffer, ins.operands[r].buffer
            root = found.get(old, old)
            if {new, root} & parts or not {new, root} <= life.keys() or root in taken:
                continue
            if life[root][1] == k and life[new][0] == k and new.nbytes <= root.nbytes:
                found[new] = root
                taken.add(root)
                life[root] = (life[root][0], life.pop(new)[1])
    return found


def over_current(code: Sequence[Instruction], current: int, following: int) -> bool:
    """Whether what the code writes to the space `following` may lie in `current` at the same offsets: none of it is
    read there later, or where it is written but element by element."""
    made: list[Array] = []  # so far
    for ins in code:
        written = {w: ins.operands[w] for w in ins.writes if ins.operands[w].buffer.space == following}
        allowed = set(_overlays(ins))
        for r, a in enumerate(ins.operands):
            if a.buffer.space != current or r in ins.writes:
                continue
            beside = [b for w, b in written.items() if (w, r) not in allowed]
            if any(_meet(a, b) for b in (*made, *beside)):
                return False
        made += written.values()
    return True


def _overlays(ins: Instruction) -> Iterator[tuple[int, int]]:
    """Pairs of an operand that is written and one that is read, at the same offset, which the kernel lets be one."""
    for w, r in _PAIRS.get(ins.kernel, _none)(ins):
        read = ins.operands[r]
        alone = not any(a.buffer is read.buffer for n, a in enumerate(ins.operands) if n != r)
        if alone and _start(ins.operands[w]) == _start(read):
            yield w, r


def _none(_: Instruction) -> Iterator[tuple[int, int]]:
    return iter(())


def _pointwise(ins: Instruction) -> Iterator[tuple[int, int]]:
    form = Pointwise.of(ins)
    for out, mode in enumerate(form.modes):
        w = form.inputs + out
        for r in range(form.inputs):
            alike = form.strides[r] == form.strides[w] and ins.operands[r].itemsize == ins.operands[w].itemsize
            if mode == 0 and alike and r not in form.registers[out + 1 :]:
                yield w, r


def _gemm(ins: Instruction) -> Iterator[tuple[int, int]]:
    if ins.ints[13] >= 2:
        yield 2, 3


def _first(ins: Instruction) -> Iterator[tuple[int, int]]:
    """Of dense arrays, the first that is written over the first that is read."""
    yield ins.writes[0], 0


def _chunks(ins: Instruction) -> Iterator[tuple[int, int]]:
    """Those of its members, where both go along the chunks."""
    first = 0
    for member in ins.members:
        for w, r in _PAIRS.get(member.kernel, _none)(member):
            if ins.strides[first + w] == ins.strides[first + r] > 0:
                yield first + w, first + r
        first += len(member.operands)


_PAIRS: dict[str, Callable[[Instruction], Iterator[tuple[int, int]]]] = {
    "chunks": _chunks,
    "pointwise": _pointwise,
    "gemm": _gemm,
    **dict.fromkeys(("standardize", "project", "project_tangent", "log_softmax", "cumsum"), _first),
}


def _meet(a: Array, b: Array) -> bool:
    (first, end), (start, stop) = _extent(a), _extent(b)
    return first < stop and start < end


def _extent(a: Array) -> tuple[int, int]:
    """In bytes of its space."""
    steps = [(n - 1) * s for n, s in zip(a.shape, a.strides, strict=True)]
    first, last = (sum(f(step, 0) for step in steps) * a.itemsize for f in (min, max))
    return _start(a) + first, _start(a) + last + a.itemsize


def _start(a: Array) -> int:
    return (a.buffer.offset or 0) + a.byte_offset
