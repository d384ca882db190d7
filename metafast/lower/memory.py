"""Buffer lifetimes to arena offsets."""

from __future__ import annotations

from bisect import insort
from collections.abc import Mapping, Sequence

from metafast.lower.arrays import Buffer, Instruction
from metafast.lower.inplace import heirs
from metafast.passes import enabled

ALIGN = 64  # a cache line, and the widest vector


def aligned(nbytes: int) -> int:
    """Rounded up to a whole number of cache lines."""
    return -(-nbytes // ALIGN) * ALIGN


def lifetimes(code: Sequence[Instruction]) -> dict[Buffer, tuple[int, int]]:
    """First and last instruction that touches each arena buffer of the section; a part counts for its block."""
    life: dict[Buffer, tuple[int, int]] = {}
    for k, ins in enumerate(code):
        for a in ins.operands:
            if a.buffer.space is None:
                whole = whole_of(a.buffer)
                first, _ = life.get(whole, (k, k))
                life[whole] = (first, k)
    return life


def whole_of(buffer: Buffer) -> Buffer:
    """The block that the buffer is part of, or itself."""
    return buffer if buffer.within is None else buffer.within[0]


def place(code: Sequence[Instruction], base: int) -> int:
    """Give every section-local arena buffer an offset from `base` on; returns the bytes the section needs in all.

    Largest first, each at the lowest offset that is free throughout its life: within a few per cent of the peak of live
    bytes on the programs seen. Two buffers that are alive at one instruction never overlap.
    """
    life = {b: span for b, span in lifetimes(code).items() if b.offset is None}
    taken = heirs(code, life) if enabled("inplace") and enabled("reuse") else {}
    top = fit(life, base)
    for heir, buffer in taken.items():
        heir.offset = buffer.offset
    for part in {a.buffer for ins in code for a in ins.operands}:
        if part.within is not None:
            assert part.within[0].offset is not None
            part.offset = part.within[0].offset + part.within[1]
    return top


def fit(life: Mapping[Buffer, tuple[int, int]], base: int) -> int:
    """Give each buffer an offset from `base` on, given its first and last use; returns where the last of them ends."""
    placed: list[tuple[int, int, int, int]] = []  # offset, end, first, last; in order
    top, apart = base, not enabled("reuse")
    for buffer, (first, last) in sorted(life.items(), key=lambda e: (-e[0].nbytes, e[1])):
        at = base
        for start, end, begins, ends in placed:
            if at + buffer.nbytes <= start:
                break
            if apart or (begins <= last and first <= ends):
                at = max(at, end)
        buffer.offset = at
        end = at + aligned(max(buffer.nbytes, 1))
        insort(placed, (at, end, first, last))
        top = max(top, end)
    return top
