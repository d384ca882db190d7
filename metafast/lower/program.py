"""Sections to one native Program: addresses for everything outside a section, the arena's plan, the listing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from metafast.graph import Input, Shape, Value
from metafast.lower.arrays import (
    ACCUMULATOR,
    ADJOINT,
    ADJOINT_NEXT,
    ARENA,
    CALL,
    EXTERNAL,
    ITEM,
    STATE,
    STATE_NEXT,
    Array,
    Buffer,
    Instruction,
    dense_strides,
)
from metafast.lower.bundle import bundle
from metafast.lower.chunk import chunk
from metafast.lower.emit import HELD, Emitter
from metafast.lower.inplace import over_current
from metafast.lower.interleave import Interleaving, interleaved_state, per_task
from metafast.lower.memory import aligned, place
from metafast.lower.spell import spell
from metafast.lower.writer import Constants
from metafast.ops import numel
from metafast.passes import enabled
from metafast.sweep import SECTIONS, Section, Store

NAMES = {torch.float32: "f32", torch.float64: "f64"}
CALL_RECORD = ("k", "steps", "weight")  # the scalars of one task and step, in the order replay writes them
SLOTS = {"state": STATE, "state_next": STATE_NEXT, "adjoint": ADJOINT, "adjoint_next": ADJOINT_NEXT}


@dataclass(frozen=True)
class External:
    """A tensor of the call: `kind` "leaf" is read; others are written, one slice a task, and a step where `per_step`.

    Memory holds steps outermost, then tasks, then `shape`. A section of many steps writes `step` alone.
    """

    kind: str
    name: str
    shape: Shape
    dtype: str
    per_task: bool
    per_step: bool = False
    step: int | None = None


@dataclass(eq=False)
class Lowered:
    """A native program and what its call needs."""

    program: Any
    externals: list[External]
    sums: dict[str, tuple[int, Shape]]  # gradient that tasks share -> byte offset among the accumulators, shape
    sum_bytes: int
    code: dict[str, list[Instruction]]
    arena_bytes: int
    state_bytes: int
    itemsize: int
    lanes: int = 1  # tasks done at once
    constants: bytes = b""
    forms: dict[tuple[Any, ...], Any] = field(default_factory=dict)  # by portions, steps, every: what calls bind

    def blocks(self, tasks: int) -> int:
        """How often the program runs for so many tasks, a multiple of `lanes`."""
        assert tasks % self.lanes == 0
        return tasks // self.lanes

    @property
    def returns(self) -> bool:
        """Whether it comes back to the states of earlier steps."""
        return bool(self.code.get("meta") or self.code.get("epilogue"))

    def listing(self) -> str:
        """The program as text: section, kernel, operands with address and shape."""
        lines = []
        for section, code in self.code.items():
            lines.append(f"{section}: {len(code)} instructions")
            for k, ins in enumerate(code):
                lines.append(f"  {k:>3} {ins.ints[0]} chunks" if ins.members else _line(f"{k}", ins))
                lines += [_line("", member) for member in ins.members]
        return "\n".join(lines)

    def flops(self) -> dict[str, float]:
        """Floating-point operations of each section, one task, one step."""
        return {name: sum(i.flops for i in code) for name, code in self.code.items()}


_SPACES = ("arena", "state", "state'", "adjoint", "adjoint'", "sum", "const", "call", "chunk")


def _line(number: str, ins: Instruction) -> str:
    return f"  {number:>3} {ins.kernel:<16} {', '.join(map(_operand, ins.operands))}   # {ins.note}"


def _operand(a: Array) -> str:
    space = a.buffer.space if a.buffer.space is not None else ARENA
    name = _SPACES[space] if space < EXTERNAL else f"ext{space - EXTERNAL}"
    return f"{name}+{(a.buffer.offset or 0) + a.byte_offset}:{'×'.join(map(str, a.shape)) or '()'}"


@dataclass
class _Layout:
    """Offsets of named arrays in one space."""

    itemsize: int
    offsets: dict[str, tuple[int, Shape]] = field(default_factory=dict)
    nbytes: int = 0

    def copy(self) -> _Layout:
        return replace(self, offsets=self.offsets.copy())

    def add(self, name: str, shape: Shape) -> None:
        self.offsets[name] = (self.nbytes, shape)
        self.nbytes += aligned(max(numel(shape), 1) * self.itemsize)

    def array(self, space: int, name: str) -> Array:
        offset, shape = self.offsets[name]
        buffer = Buffer(numel(shape) * self.itemsize, space, offset)
        return Array(buffer, shape, dense_strides(shape), self.itemsize)


def _matrices_first(shapes: Mapping[str, Shape]) -> list[tuple[str, Shape]]:
    """In the one order that state, adjoints and sums have: products update matrices where they make the gradient, so
    what one pass is to do to the others lies together."""
    return sorted(shapes.items(), key=lambda item: -len(item[1]))


def _summed(sections: Mapping[str, Section]) -> dict[str, Shape]:
    """The gradients that tasks share."""
    found: dict[str, Shape] = {}
    for section in sections.values():
        for store in section.stores:
            if store.kind == "gradient" and not per_task(store.name):
                found[store.name] = section.graph.outputs[store.output].shape
    return found


class _Lowering:
    def __init__(
        self,
        state: Mapping[str, Shape],
        dtype: torch.dtype,
        opcodes: Sequence[str],
        lanes: int,
    ) -> None:
        self.dtype, self.item, self.lanes = dtype, dtype.itemsize, lanes
        self.opcodes = {name: k for k, name in enumerate(opcodes)}
        self.constants = Constants(dtype)
        self.state = _Layout(self.item)
        for name, shape in _matrices_first(state):
            self.state.add(name, shape)
        self.adjoint_bytes = self.state.nbytes
        self.sums = _Layout(self.item)
        self.externals: list[External] = []
        self.where: dict[tuple[str, str, int | None], Array] = {}
        self.persistent: dict[tuple[str, str], Array] = {}
        self.base = self.arena = 0  # where what crosses sections ends, and all else

    def add(self, sections: Mapping[str, Section]) -> dict[str, list[Instruction]]:
        """The code of those sections, addresses and all. What is there stays where it is."""
        for name, shape in _matrices_first(_summed(sections)):
            if name not in self.sums.offsets:
                self.sums.add(name, shape)
        code = {name: self._section(spell(section)) for name, section in sections.items()}
        _write_over_current(code)
        self._keep_hoisted()
        self.arena = max([self.arena, *(place(c, self.base) for c in code.values())])
        return code

    def copy(self) -> _Lowering:
        """One that more is added to."""
        made = copy(self)
        made.constants, made.sums, made.externals = self.constants.copy(), self.sums.copy(), self.externals.copy()
        made.where, made.persistent = self.where.copy(), self.persistent.copy()
        return made

    def _section(self, section: Section) -> list[Instruction]:
        known = {i.value: self._input(i) for i in section.graph.inputs}
        emitter = Emitter(section, known, self._target, self.constants, self.opcodes)
        code = emitter.run()
        self.persistent.update(emitter.kept)
        for (kind, _), array in emitter.kept.items():
            if kind == "kept" and array.buffer.space is None:
                self._keep_with_state(array.buffer)
        held = {array.buffer for array in self.persistent.values()}
        return chunk(bundle(code, held), held)

    def _keep_with_state(self, buffer: Buffer) -> None:
        """What a step keeps for its way back lies behind the state it leads to."""
        buffer.space, buffer.offset = STATE_NEXT, self.state.nbytes
        self.state.nbytes += aligned(max(buffer.nbytes, 1))

    def _keep_hoisted(self) -> None:
        """What crosses sections lies at the arena's bottom and stays."""
        for array in self.persistent.values():
            b = array.buffer
            if b.space is None and b.offset is None:
                b.offset = self.base
                self.base += aligned(max(b.nbytes, 1))

    # -- addresses

    def _input(self, i: Input) -> Array:
        shape, dtype = i.value.shape, i.value.dtype
        if i.role in ("state", "adjoint"):
            return self.state.array(SLOTS[i.role], i.name)
        if i.role == "call":
            buffer = Buffer(numel(shape) * self.item, CALL, CALL_RECORD.index(i.name) * self.item)
            return Array(buffer, shape, dense_strides(shape), self.item)
        if i.role in ("hoisted", "spill", "kept"):
            return self.persistent[i.role, i.name]
        return self._external("leaf", i.name, shape, dtype, per_task(i.name))

    def _target(self, store: Store, value: Value) -> Array | None:
        kind, name, shape = store.kind, store.name, value.shape
        if kind in SLOTS:
            return self.state.array(SLOTS[kind], name)
        if kind in HELD:
            return None
        if kind == "spill":
            return self._spill(name, shape)
        if kind == "gradient" and not per_task(name):
            return self.sums.array(ACCUMULATOR, name)
        per_step = kind in ("step_loss", "support_stat")
        return self._external(kind, name, shape, value.dtype, True, per_step, store.step)

    def _spill(self, name: str, shape: Shape) -> Array:
        key = ("spill", name)
        if key not in self.persistent:
            buffer = Buffer(numel(shape) * self.item)
            self.persistent[key] = Array(buffer, shape, dense_strides(shape), self.item)
        return self.persistent[key]

    def _external(
        self,
        kind: str,
        name: str,
        shape: Shape,
        dtype: str,
        each_task: bool,
        each_step: bool = False,
        step: int | None = None,
    ) -> Array:
        """A tensor of the call as the section sees it: of several lanes one task is the next one's neighbour."""
        if (kind, name, step) not in self.where:
            item, strides = ITEM.get(dtype, self.item), dense_strides(shape)
            own = shape[:-1] if self.lanes > 1 and each_task else shape
            if own is not shape:
                strides = (*dense_strides(own), numel(own))
            buffer = Buffer(numel(shape) * item, EXTERNAL + len(self.externals), 0)
            self.externals.append(External(kind, name, own, dtype, each_task, each_step, step))
            self.where[kind, name, step] = Array(buffer, shape, strides, item)
        return self.where[kind, name, step]


def _write_over_current(code: Mapping[str, list[Instruction]]) -> None:
    """A step back writes its adjoints over those it reads, and a step the state that nobody comes back to, where order
    allows."""
    if not enabled("inplace"):
        return
    returns = code.get("meta") or code.get("epilogue")
    for name, current, following in (("meta", ADJOINT, ADJOINT_NEXT), ("inner", STATE, STATE_NEXT)):
        if (name == "inner" and returns) or not over_current(code.get(name, ()), current, following):
            continue
        for ins in code.get(name, ()):
            for a in ins.operands:
                if a.buffer.space == following:
                    a.buffer.space = current


def _native(code: Sequence[Instruction]) -> list[tuple[Any, ...]]:
    """As the native Program wants it: metafast/_C.pyi."""
    out: list[tuple[Any, ...]] = []
    for ins in code:
        places = [] if ins.members else [_address(a) for a in ins.operands]
        row = (ins.kernel, places, [int(i) for i in ins.ints], [float(f) for f in ins.floats])
        out.append((*row, _members(ins)) if ins.members else row)
    return out


def _members(chunks: Instruction) -> list[tuple[Any, ...]]:
    strides = iter(chunks.strides)
    return [
        (kernel, [(*place, next(strides)) for place in places], ints, floats)
        for kernel, places, ints, floats in _native(chunks.members)
    ]


def _address(a: Array) -> tuple[int, int]:
    assert a.buffer.offset is not None
    return ARENA if a.buffer.space is None else a.buffer.space, a.buffer.offset + a.byte_offset


class Prepared:
    """All sections but `query`, lowered: programs that differ in the query alone have the rest in common."""

    def __init__(
        self, state: Mapping[str, Shape], sections: Mapping[str, Section], dtype: torch.dtype, lanes: int = 1
    ) -> None:
        """`state` names what one step hands to the next. With more than one of `lanes` so many tasks are done at once.

        Raises NotInterleaved where that can't be.
        """
        from metafast import _C

        self._interleaving = Interleaving(lanes) if lanes > 1 else None
        if self._interleaving is not None:
            state, sections = interleaved_state(state, lanes), self._interleaving.sections(sections)
        self._lowering = _Lowering(state, dtype, _C.pointwise_opcodes(), lanes)
        self._code = self._lowering.add(sections)
        self._native = {name: _native(c) for name, c in self._code.items()}

    def with_query(self, query: Section | None) -> Lowered:
        """The program with that section, if any. Raises NotInterleaved as above."""
        lowering, code, native = self._lowering.copy(), self._code, self._native
        if query is not None:
            if self._interleaving is not None:
                query = self._interleaving.copy().section(query)
            more = lowering.add({"query": query})
            code, native = {**code, **more}, {**native, "query": _native(more["query"])}
        return _assembled(lowering, {name: code[name] for name in SECTIONS if name in code}, native)


def _assembled(lowering: _Lowering, code: dict[str, list[Instruction]], native: Mapping[str, Any]) -> Lowered:
    from metafast import _C

    constants = bytes(lowering.constants.data)
    program = _C.Program(
        NAMES[lowering.dtype],
        dict(native),
        arena_bytes=lowering.arena,
        state_bytes=lowering.state.nbytes,
        adjoint_bytes=lowering.adjoint_bytes,
        accumulator_bytes=lowering.sums.nbytes,
        constants=constants,
        n_external=len(lowering.externals),
        lanes=lowering.lanes,
    )
    return Lowered(
        program,
        lowering.externals,
        lowering.sums.offsets,
        lowering.sums.nbytes,
        code,
        lowering.arena,
        lowering.state.nbytes,
        lowering.item,
        lowering.lanes,
        constants,
    )


def lower(section: Section, dtype: torch.dtype) -> Lowered:
    """The native program of one section that adapts nothing."""
    return Prepared({}, {}, dtype).with_query(section)
