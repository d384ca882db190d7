"""A few images at a time: instructions that follow each other over large arrays become one, done chunk by chunk.

A convolution of a first layer writes more than a cache holds, and its statistics and its pool read it from memory. Done
for an image or a few of them at a time, each finds in cache what the last one wrote, and arrays that nobody else reads
have memory for one chunk only. What adds up over images writes a part for each chunk, which are added afterwards.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from metafast.lower.arrays import CHUNK, Array, Buffer, Instruction, Pointwise, added_up, is_dense
from metafast.lower.memory import fit, whole_of
from metafast.ops import numel
from metafast.passes import enabled

LEAST = 1 << 20  # bytes of an array for which this is worth while: second-level caches hold smaller ones
AIM = 1 << 18  # bytes that one chunk is to walk, if images are no larger
LIGHT = 16  # what belongs to all images (weights, parts of sums) is so many times smaller than a chunk
SOON = 32  # operations for an element take no longer than to read it from memory and to have written it there
WINDOW = 16  # instructions among which those that belong together are looked for

# Of each operand: it is walked image by image, read whole, or adds up over images.
ALONG, WHOLE, TOTAL = "along", "whole", "total"
ROLES = {
    "conv_fwd": (ALONG, WHOLE, ALONG, WHOLE),
    "conv_dx": (ALONG, WHOLE, ALONG),
    "conv_dw": (ALONG, ALONG, TOTAL),
    "max_pool": (ALONG, ALONG, ALONG, WHOLE),
    "pool_gather": (ALONG, ALONG, ALONG),
    "pool_scatter": (ALONG, ALONG, ALONG),
    "avg_pool": (ALONG, ALONG),
    "avg_pool_adj": (ALONG, ALONG),
    "moments": (ALONG, ALONG, ALONG),
}  # all of these have the number of images first among their ints
MODES = {"conv_fwd": 19, "conv_dx": 19, "conv_dw": 19, "pool_scatter": 6, "avg_pool": 14, "avg_pool_adj": 14}  # of ints

Found = TypeVar("Found")
Span = tuple[int, int, int]  # a space, where in it, and where it ends
Place = Any  # what tells two places in memory apart: a block of the arena, or a space and an offset


@dataclass(frozen=True)
class _Walk:
    """How an instruction goes along images: the int that counts them, or rows of them, and what each operand does.

    `spans`: elements that all chunks walk of each operand that is walked, 0 of others.
    """

    ins: Instruction
    at: int
    roles: tuple[str, ...]
    spans: tuple[int, ...]

    @property
    def count(self) -> int:
        return self.ins.ints[self.at]

    @functools.cached_property
    def nbytes(self) -> int:
        return sum(span * a.itemsize for span, a in zip(self.spans, self.ins.operands, strict=True))

    @functools.cached_property
    def is_light(self) -> bool:
        """Whether what belongs to all images is little beside a chunk."""
        fixed = sum(_nbytes(a) for a, role in zip(self.ins.operands, self.roles, strict=True) if role != ALONG)
        return LIGHT * fixed <= max(self.nbytes // self.count, min(self.nbytes, AIM))

    @functools.cached_property
    def uses(self) -> dict[Place, set[tuple[Any, ...]]]:
        """What it does to each place: role, where from, and how far chunks go; these alone tell two uses apart."""
        found: dict[Place, set[tuple[Any, ...]]] = {}
        for a, role, span in zip(self.ins.operands, self.roles, self.spans, strict=True):
            found.setdefault(_place(a), set()).add((role, a.byte_offset, span * a.itemsize))
        return found


def chunk(code: Sequence[Instruction], held: set[Buffer]) -> list[Instruction]:
    """The section's code with such runs joined; arrays in `held` are read by other sections, too."""
    code = list(code)
    least = max((a.buffer.nbytes for ins in code for a in ins.operands), default=0)
    if not enabled("chunks") or least < LEAST:
        return code
    while least >= LEAST:  # the largest arrays first: what they are shared by is joined before what shares less
        code = _gathered(code, least)
        least = LEAST if LEAST < least < 4 * LEAST else least // 4
    _make_again(code, held)
    return [one for ins in code for one in (_Joining(ins.members, code, held).run() if ins.members else [ins])]


def _gathered(code: list[Instruction], least: int) -> list[Instruction]:
    """The code with each run that shares arrays of so many bytes as one instruction, so far with its members alone."""
    at = 0
    while at < len(code):
        run = _run_from(code, at, least)
        if len(run.members) > 1:
            code[at : run.end] = [*run.before, _together([walk.ins for walk in run.members]), *run.behind]
            at += len(run.before)
        at += 1
    return code


def _together(members: list[Instruction]) -> Instruction:
    operands = [a for ins in members for a in ins.operands]
    ends = [sum(len(ins.operands) for ins in members[:k]) for k in range(len(members))]
    writes = [end + n for end, ins in zip(ends, members, strict=True) for n in ins.writes]
    names = [ins.note.partition("  ") for ins in members]
    note = f"{', '.join(name for name, _, _ in names)}  {names[0][2]}".rstrip()
    return Instruction("chunks", operands, writes, [], [], sum(ins.flops for ins in members), note, members)


# ---- one instruction ------------------------------------------------------------------------------------------


def _once(find: Callable[[Instruction], Found]) -> Callable[[Instruction], Found]:
    """What it finds out about an instruction is noted there."""

    @functools.wraps(find)
    def found(ins: Instruction) -> Found:
        if find.__name__ not in ins.__dict__:
            ins.__dict__[find.__name__] = find(ins)
        result: Found = ins.__dict__[find.__name__]
        return result

    return found


@_once
def _walk(ins: Instruction) -> _Walk | None:
    """None where it cannot be done image by image."""
    if ins.kernel == "pointwise":
        return _walk_pointwise(ins)
    roles = ROLES.get(ins.kernel, ())[: len(ins.operands)]
    if not roles or ins.ints[0] < 2 or not all(map(is_dense, ins.operands)) or _in_pieces(ins):
        return None
    spans = [numel(a.shape) if role == ALONG else 0 for a, role in zip(ins.operands, roles, strict=True)]
    return _Walk(ins, 0, roles, tuple(spans))


def _in_pieces(ins: Instruction) -> bool:
    return ins.kernel == "conv_dw" and ins.ints[21] > 1


def _walk_pointwise(ins: Instruction) -> _Walk | None:
    """Along its outermost dim, where each operand has a stretch of its own for each step, or is read whole."""
    form = Pointwise.of(ins)
    dims, strides = form.dims, form.strides
    if len(dims) < 2 or dims[0] < 2 or not all(s[0] for s in strides[form.inputs :]):
        return None  # what adds up over the outermost dim is no part for each step
    for s in strides:
        reach = sum((n - 1) * abs(step) for n, step in zip(dims[1:], s[1:], strict=True))
        if min(s) < 0 or (s[0] and reach >= s[0]):
            return None
    roles = tuple(ALONG if s[0] else WHOLE for s in strides)
    return _Walk(ins, 5, roles, tuple(s[0] * dims[0] for s in strides))


def _adds(ins: Instruction) -> bool:
    """Whether it adds to what an operand holds."""
    if ins.kernel == "pointwise":
        return any(mode % 2 for mode in Pointwise.of(ins).modes)
    return ins.kernel in MODES and ins.ints[MODES[ins.kernel]] != 0


def _nbytes(a: Array) -> int:
    return min(numel(a.shape) * a.itemsize, a.buffer.nbytes)


@_once
def _largest(ins: Instruction) -> int:
    """Bytes of its largest operand."""
    return max(map(_nbytes, ins.operands), default=0)


def _place(a: Array) -> Place:
    return whole_of(a.buffer) if a.buffer.space is None else (a.buffer.space, a.buffer.offset)


@_once
def _touched(ins: Instruction) -> tuple[set[Place], set[Place]]:
    """Everything it touches, and what of it it writes."""
    return {_place(a) for a in ins.operands}, {_place(ins.operands[k]) for k in ins.writes}


def _meet(a: Instruction, b: Instruction) -> bool:
    """Whether their order matters."""
    ours, made = _blocks(a)
    theirs, makes = _blocks(b)
    if not (made.isdisjoint(theirs) and makes.isdisjoint(ours)):
        return True
    (reach, put), (other_reach, other_put) = _spans(a), _spans(b)
    return _overlap(put, other_reach) or _overlap(reach, other_put)


@_once
def _blocks(ins: Instruction) -> tuple[set[Buffer], set[Buffer]]:
    """The blocks it touches, and those of them it writes. One pass over many parameters is over all of their places,
    not only the first one's."""
    return {whole_of(a.buffer) for a in ins.operands}, {whole_of(ins.operands[k].buffer) for k in ins.writes}


@_once
def _spans(ins: Instruction) -> tuple[set[Span], set[Span]]:
    """Where those of them lie that have addresses."""
    touched, written = _blocks(ins)
    return _addressed(touched), _addressed(written)


def _addressed(blocks: set[Buffer]) -> set[Span]:
    return {(b.space, b.offset, b.offset + b.nbytes) for b in blocks if b.space is not None and b.offset is not None}


def _overlap(some: set[Span], others: set[Span]) -> bool:
    return any(a[0] == b[0] and a[1] < b[2] and b[1] < a[2] for a in some for b in others)


# ---- runs of them ---------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """Those that are done chunk by chunk; those among them that can come before; those that must come behind."""

    members: list[_Walk]
    before: list[Instruction]
    behind: list[Instruction]
    end: int


def _run_from(code: Sequence[Instruction], at: int, least: int) -> _Run:
    """Of those that share arrays of so many bytes."""
    run = _Run([], [], [], at + 1)
    if _largest(code[at]) < least:
        return run
    first = _walk(code[at])
    if first is None or not first.is_light:
        return run
    run.members.append(first)
    before: list[Instruction] = []
    behind: list[Instruction] = []
    for k in range(at + 1, min(at + WINDOW, len(code))):
        ins = code[k]
        if any(_meet(ins, other) for other in behind):
            behind.append(ins)
        elif (walk := _walk(ins)) is not None and _joins(walk, run.members, least):
            run.members.append(walk)
            run.before, run.behind, run.end = before.copy(), behind.copy(), k + 1
        elif any(_meet(ins, walk.ins) for walk in run.members):
            behind.append(ins)
        else:
            before.append(ins)
    return run


def _joins(walk: _Walk, members: Sequence[_Walk], least: int) -> bool:
    """Whether it walks a large array that they walk, image by image as they do, and writes to nothing otherwise."""
    if math.gcd(walk.count, *(m.count for m in members)) < 2 or not walk.is_light:
        return False
    shares = False
    _, written = _touched(walk.ins)
    for other in members:
        theirs = other.uses
        for place, uses in walk.uses.items():
            if place not in theirs:
                continue
            both = uses | theirs[place]
            alike = len(both) == 1 and next(iter(both))[0] == ALONG
            if not alike and place in written | _touched(other.ins)[1]:
                return False
            shares |= alike and next(iter(both))[2] >= least
    return shares


# ---- arrays that are made again -------------------------------------------------------------------------------


def _make_again(code: list[Instruction], held: set[Buffer]) -> None:
    """Let each run that reads a large array make it again from small ones, where all its readers are runs: then none of
    it need be in memory. A first layer's convolution is made sooner than read."""
    for k, maker in enumerate(code):
        for ins in maker.members:
            if not _is_made_soon(ins) or ins.operands[ins.writes[0]].buffer in held:
                continue
            for at in _readers(code, k, ins):
                code[at] = _together([ins, *code[at].members])


def _is_made_soon(ins: Instruction) -> bool:
    """Whether it makes one large array of small ones, in few operations."""
    walk = _walk(ins)
    if walk is None or len(ins.writes) != 1 or TOTAL in walk.roles or _adds(ins):
        return False
    elements = walk.spans[ins.writes[0]]
    made = elements * ins.operands[ins.writes[0]].itemsize
    return made >= LEAST and 2 * (walk.nbytes - made) <= made and ins.flops <= SOON * elements


def _readers(code: Sequence[Instruction], maker: int, ins: Instruction) -> list[int]:
    """The other runs that read what it makes; none where others do, or where others have a hand in making it, or where
    what it is made of is gone by then."""
    needed, (made,) = _touched(ins)
    written = set().union(*(_touched(other)[1] for other in code[maker].members if other is not ins))
    found: list[int] = []
    for k in range(maker + 1, len(code)):
        touched, theirs = _touched(code[k])
        if made in touched:
            if not code[k].members or (written | theirs) & needed or not _can_make(code[k], ins):
                return []
            found.append(k)
        written |= theirs
    return found


def _can_make(run: Instruction, ins: Instruction) -> bool:
    walks = [walk for each in run.members if (walk := _walk(each)) is not None]
    own = _walk(ins)
    assert own is not None
    if math.gcd(own.count, *(walk.count for walk in walks)) < 2:
        return False
    ((use,),) = (own.uses[place] for place in _touched(ins)[1])
    return all(uses == {use} for walk in walks for place, uses in walk.uses.items() if place in _touched(ins)[1])


# ---- one instruction of many ----------------------------------------------------------------------------------


class _Joining:
    def __init__(self, members: Sequence[Instruction], code: Sequence[Instruction], held: set[Buffer]) -> None:
        self.members = [walk for ins in members if (walk := _walk(ins)) is not None]
        self.count = _chunks(self.members)
        self.outside = _read_outside(members, code) | held
        self.local: dict[Buffer, Buffer] = {}  # what lives within a chunk
        self.life: dict[Buffer, tuple[int, int]] = {}
        self.totals: list[Instruction] = []

    def run(self) -> list[Instruction]:
        """The instruction, and those that add up what its chunks have made."""
        members: list[Instruction] = []
        strides: list[int] = []
        for k, walk in enumerate(self.members):
            operands = [self._operand(walk, n, k, strides) for n in range(len(walk.roles))]
            ints = [*walk.ins.ints]
            ints[walk.at] //= self.count
            if TOTAL in walk.roles:
                ints[MODES[walk.ins.kernel]] = 0
            members.append(replace(walk.ins, operands=operands, ints=ints))
        memory = fit(self.life, 0)
        for buffer in self.life:
            buffer.space = CHUNK
        whole = _together(members)
        whole.ints, whole.strides = [self.count, memory], strides
        return [whole, *self.totals]

    def _operand(self, walk: _Walk, n: int, k: int, strides: list[int]) -> Array:
        a, role = walk.ins.operands[n], walk.roles[n]
        if role == TOTAL:
            return self._part(walk, a, strides)
        if role == ALONG and self._is_local(a, walk.spans[n], n in walk.ins.writes and not _adds(walk.ins)):
            buffer = self.local.setdefault(a.buffer, Buffer(a.buffer.nbytes // self.count))
            first, _ = self.life.get(buffer, (k, k))
            self.life[buffer] = (first, k)
            strides.append(0)
            return replace(a, buffer=buffer)
        strides.append(walk.spans[n] * a.itemsize // self.count)
        return a

    def _is_local(self, a: Array, span: int, made: bool) -> bool:
        """Whether it is needed nowhere else, and its first use here writes all of it, whatever it held."""
        b = a.buffer
        if b in self.local:
            return True
        free = b.space is None and b.offset is None and b.within is None and b not in self.outside
        return free and made and span * a.itemsize == b.nbytes and a.offset == 0

    def _part(self, walk: _Walk, total: Array, strides: list[int]) -> Array:
        """What a chunk adds up; all of them are added afterwards."""
        many = numel(total.shape)
        parts = Array(Buffer(self.count * many * total.itemsize), (self.count, many), (many, 1), total.itemsize)
        self.totals.append(added_up(parts, total, walk.ins.ints[MODES[walk.ins.kernel]], walk.ins.note))
        strides.append(many * total.itemsize)
        return replace(total, buffer=parts.buffer, offset=0)


def _read_outside(members: Sequence[Instruction], code: Sequence[Instruction]) -> set[Buffer]:
    """What others than these members touch; a run that makes an array again has no need of it."""
    found: set[Buffer] = set()
    for ins in code:
        if ins.members is not members:
            touched = {a.buffer for a in ins.operands}
            found |= touched - _made_whole(ins.members) if ins.members else touched
    return found


def _made_whole(members: Sequence[Instruction]) -> set[Buffer]:
    """The arrays of which nothing is read before all is written."""
    seen: set[Buffer] = set()
    made: set[Buffer] = set()
    for ins in members:
        for n, a in enumerate(ins.operands):
            first = n in ins.writes and a.buffer not in seen and a.offset == 0 and not _adds(ins)
            if first and numel(a.shape) * a.itemsize == a.buffer.nbytes and is_dense(a):
                made.add(a.buffer)
            seen.add(a.buffer)
    return made


def _chunks(members: Sequence[_Walk]) -> int:
    """How many: as few as walk no more than `AIM` at a time."""
    images = math.gcd(*(walk.count for walk in members))
    nbytes = sum(walk.nbytes for walk in members)
    return next((n for n in range(2, images) if images % n == 0 and nbytes <= n * AIM), images)
