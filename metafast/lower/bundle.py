"""One pass over many parameters: pointwise instructions that do the same to arrays which can lie in a row become one.

The update of every parameter is the same few operations, and so are its adjoint and the sums that follow; a small net
spends more time on calling them than in them. State and gradients keep all parameters in one order, each on its own
cache line; arrays of the arena that meet them here are laid out alike, gaps included, and one instruction runs over the
whole row. What it computes in the gaps nobody reads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from metafast.lower.arrays import ACCUMULATOR, SUM, Array, Buffer, Instruction
from metafast.lower.memory import aligned
from metafast.passes import enabled

Place = Any  # what tells two places in memory apart: a buffer of the arena, or a space and an offset


def bundle(code: Sequence[Instruction], pinned: set[Buffer]) -> list[Instruction]:
    """The section's code with rows of alike instructions joined; arena buffers in `pinned` stay where they are."""
    code = list(code)
    if not enabled("bundle"):
        return code
    for with_state in (True, False):  # the order of state is given: what meets it is laid out first
        for rows in _alike(code):
            members = _in_order(rows, pinned) if with_state == any(map(_given, _runs(rows[0]))) else []
            for row in _rows(members):
                code = _joined(code, row)
    return code


def _alike(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """Instructions that do the same to flat arrays, in groups of two or more."""
    groups: dict[Any, list[Instruction]] = defaultdict(list)
    for ins in code:
        if ins.kernel == "pointwise" and _flat(ins):
            groups[_program(ins), _where(ins)].append(ins)
    return [group for group in groups.values() if len(group) > 1]


def _flat(ins: Instruction) -> bool:
    """Whether it walks whole arrays element by element, with scalars beside them, and adds nothing up."""
    rank, _, outputs = ins.ints[:3]
    if rank != 1:
        return False
    length, strides = ins.ints[5], _strides(ins)
    modes = ins.ints[6 + len(strides) + outputs :][:outputs]
    whole = [a.offset == 0 and a.buffer.nbytes == length * a.itemsize for a in ins.operands]
    return 1 in strides and max(modes) < SUM and all(
        s == 0 or (s == 1 and w) for s, w in zip(strides, whole, strict=True)
    )


def _strides(ins: Instruction) -> list[int]:
    return ins.ints[6 : 6 + len(ins.operands)]


def _program(ins: Instruction) -> Any:
    """Everything about the instruction but its length and its operands."""
    return tuple(ins.ints[:5]), tuple(ins.ints[6:]), tuple(ins.floats)


def _where(ins: Instruction) -> Any:
    """The address of each scalar and the space of each run."""
    pairs = zip(_strides(ins), ins.operands, strict=True)
    return tuple(a.buffer.space if stride else (_place(a), a.offset) for stride, a in pairs)


def _place(a: Array) -> Place:
    return a.buffer if a.buffer.space is None else (a.buffer.space, a.buffer.offset)


def _runs(ins: Instruction) -> list[Array]:
    return [a for s, a in zip(_strides(ins), ins.operands, strict=True) if s]


def _given(a: Array) -> bool:
    """Whether its place is given: in state, adjoints or accumulators, which all list parameters in one order."""
    return a.buffer.space is not None and a.buffer.space <= ACCUMULATOR


def _in_order(group: Sequence[Instruction], pinned: set[Buffer]) -> list[Instruction]:
    """Those that may move into a row, in the order of the places given."""
    free = [ins for ins in group if all(_given(a) or _movable(a, pinned) for a in _runs(ins))]
    return sorted(free, key=lambda ins: [a.buffer.offset or 0 for a in _runs(ins) if _given(a)])


def _movable(a: Array, pinned: set[Buffer]) -> bool:
    return a.buffer.space is None and a.buffer.offset is None and a.buffer not in pinned


def _rows(members: Sequence[Instruction]) -> Iterator[list[Instruction]]:
    """Cut into stretches in which every run can follow the one before."""
    row: list[Instruction] = []
    for ins in members:
        if row and not all(map(_follows, _runs(row[-1]), _runs(ins))):
            yield row
            row = []
        if len({_place(a) for each in (*row, ins) for a in _runs(each)}) == (len(row) + 1) * len(_runs(ins)):
            row.append(ins)
    yield row


def _follows(a: Array, b: Array) -> bool:
    """Whether b lies behind a, or may be laid there."""
    x, y = a.buffer, b.buffer
    if x.space is not None:
        return x.offset is not None and y.offset == x.offset + aligned(x.nbytes)
    if x.within is None or y.within is None:
        return x.within is y.within
    return x.within[0] is y.within[0] and y.within[1] == x.within[1] + aligned(x.nbytes)


def _joined(code: list[Instruction], row: Sequence[Instruction]) -> list[Instruction]:
    """The code with the row as one instruction, at the place of its last; unchanged where others come between."""
    members = set(map(id, row))
    at = [k for k, ins in enumerate(code) if id(ins) in members]
    if len(at) < 2 or not _independent(code, at):
        return code
    total = sum(aligned(ins.ints[5] * ins.operands[-1].itemsize) for ins in row[:-1])
    elements = total // row[0].operands[-1].itemsize + row[-1].ints[5]
    columns = zip(*(ins.operands for ins in row), strict=True)
    operands = [_run(column, elements) if s else column[0] for s, column in zip(_strides(row[0]), columns, strict=True)]
    ints = [*row[0].ints[:5], elements, *row[0].ints[6:]]
    flops = sum(ins.flops for ins in row)
    note = f"{row[0].note.strip()} ×{len(row)}"
    joined = replace(row[0], operands=operands, ints=ints, flops=flops, note=note)
    return [joined if k == at[-1] else ins for k, ins in enumerate(code) if k == at[-1] or k not in at]


def _independent(code: Sequence[Instruction], at: Sequence[int]) -> bool:
    """Whether every member may run where the last one does: nobody up to there meets what it writes, or writes what it
    reads."""
    members = set(at)
    touched = {k: _touched(code[k]) for k in range(at[0], at[-1] + 1)}
    for k in at:
        reads, writes = touched[k]
        for other, (theirs, made) in touched.items():
            if other == k or (other < k and other not in members):
                continue
            if writes & (theirs | made) or reads & made:
                return False
    return True


def _touched(ins: Instruction) -> tuple[set[Place], set[Place]]:
    writes = {_place(ins.operands[k]) for k in ins.writes}
    return {_place(a) for k, a in enumerate(ins.operands) if k not in ins.writes}, writes


def _run(column: Sequence[Array], elements: int) -> Array:
    """One array over a run of arrays; those of the arena are tied together for the memory planner."""
    first = column[0]
    nbytes = elements * first.itemsize
    if first.buffer.space is not None:
        buffer = Buffer(nbytes, first.buffer.space, first.buffer.offset)
    elif first.buffer.within is not None:
        whole, at = first.buffer.within
        return Array(whole, (elements,), (1,), first.itemsize, at // first.itemsize)
    else:
        buffer, at = Buffer(nbytes), 0
        for a in column:
            a.buffer.within = (buffer, at)
            at += aligned(a.buffer.nbytes)
    return Array(buffer, (elements,), (1,), first.itemsize)
