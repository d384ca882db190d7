"""Units to instructions: clusters of pointwise ops, sums of products, and what writes where it belongs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from metafast.graph import Node, Value
from metafast.lower.arrays import (
    SUM,
    Array,
    Buffer,
    Instruction,
    added_up,
    broadcast_to,
    collapse,
    dense_strides,
    is_dense,
    lies_in,
    memory_order,
    reshaped,
    same_strides,
    viewed,
)
from metafast.lower.fuse import Unit, aliases, units
from metafast.lower.kernels import NHWC, Kernels
from metafast.lower.registers import Registers
from metafast.lower.writer import Constants, Into, Result, named
from metafast.ops import TABLE, numel
from metafast.passes import enabled
from metafast.sweep import Section, Store

GEMM_MODE, GEMM_BIAS, GEMM_PAIR = 13, 14, 15  # where they stand among the ints: csrc/kernels/cpu/gemm.hpp
DIRECT = {"matmul", "matmul_lanes", "conv2d", "reduce"}  # kernels that can write, or add, where the caller says
HELD = ("hoisted", "kept")  # stores of values that later sections read where they were made


class Emitter(Kernels):
    """Lowers one section. `known` places its inputs, `target` its stores (None: keep the value where it is made)."""

    def __init__(
        self,
        section: Section,
        known: dict[Value, Array],
        target: Callable[[Store, Value], Array | None],
        constants: Constants,
        opcodes: dict[str, int],
    ) -> None:
        super().__init__(section.graph, known, constants)
        self.section = section
        self.target = target
        self.opcodes = opcodes
        self.kept: dict[tuple[str, str], Array] = {}
        self.alias = aliases(self.graph, lambda node: node.op == "stop_gradient")
        self.uses = self._outside_uses()

    def run(self) -> list[Instruction]:
        """All instructions, in order."""
        plan = units(self.section)
        self.homes: dict[Node, list[Unit]] = {}
        self.storing: dict[Value, list[Unit]] = {}
        for unit in plan:
            for n in unit.nodes:
                self.homes.setdefault(n, []).append(unit)
            for v, _ in unit.stores:
                self.storing.setdefault(v, []).append(unit)
        for unit in plan:
            if unit.kind == "pointwise":
                self._cluster(unit)
            elif unit.kind == "sum":
                self._sum(unit)
            elif unit.kind == "biased":
                self._biased(unit)
            elif unit.kind == "onto":
                self._onto(unit)
            else:
                self._node(unit.nodes[0], self._direct(unit.nodes[0], unit.nodes[0].outputs[0]))
        return self.code

    def _outside_uses(self) -> dict[Value, list[Node]]:
        uses: dict[Value, list[Node]] = {}
        for n in self.graph.nodes:
            for v in n.inputs:
                uses.setdefault(v, []).append(n)
        return uses

    # ---- pointwise

    def _cluster(self, unit: Unit) -> None:
        if not unit.nodes and not unit.stores:
            return
        inside = [n.outputs[0] for n in unit.nodes]
        code = Registers(unit, self.alias, self.producer, self.opcodes)
        arrays = [broadcast_to(self.array(v), unit.shape) for v in code.inputs]
        order = self.layout(arrays, unit.shape)
        sums = self._adding(unit, order, arrays)
        for n in unit.sums:
            self.homes[n] = [unit] if n in sums else [Unit("node")]  # made by another instruction
        needed = [v for v in inside if self._needed(v, unit)]
        code.allocate(unit, [*needed, *(n.inputs[0] for n in sums)])
        parted = self._parted(sums, order)
        parts = {} if parted is None else {n: self.fresh((unit.shape[parted], *n.outputs[0].shape)) for n in sums}
        results = self._results(unit, needed, code, order)
        for n in sums:
            out, mode = (parts[n], 0) if n in parts else self.result(n, self._direct(n, n.outputs[0]), None)
            results.append((_sum_view(n, out, parted), code.register(n.inputs[0]), SUM + mode))
        self.pointwise(
            arrays, results, code.ops, code.count, code.floats, unit.shape, order, self._note(unit), len(unit.nodes)
        )
        for n, each in parts.items():
            self._total(n, each)
        for n in unit.sums:
            if n not in sums:
                self._node(n, self._direct(n, n.outputs[0]))

    def _adding(self, unit: Unit, order: Sequence[int], arrays: Sequence[Array]) -> list[Node]:
        """Which of its sums the cluster can make: the kernel walks all operands as one set of merged dims."""
        if not unit.sums:
            return []
        stored = [where for value, store in unit.stores if (where := self.target(store, value)) is not None]
        if not all(lies_in(a, order) for a in stored):
            return []
        made: list[Node] = []
        for n in unit.sums:
            if self._add_up([*made, n], order, arrays):
                made.append(n)
        return made

    def _add_up(self, sums: Sequence[Node], order: Sequence[int], arrays: Sequence[Array]) -> bool:
        """Whether each adds over everything, or over all but what lies innermost and is walked as one."""
        shape = sums[0].inputs[0].shape
        views = [_sum_view(n, Array(Buffer(0), (), (), self.item)) for n in sums]
        strides = [[a.strides[d] for d in order] for a in (*arrays, *views)]
        strides.append([dense_strides(shape, order)[d] for d in order])
        _, collapsed = collapse(tuple(shape[d] for d in order), strides)
        ends = [each or [0] for each in collapsed[len(arrays) : -1]]
        return numel(shape) > 0 and all(not any(each[:-1]) and each[-1] in (0, 1) for each in ends)

    def _parted(self, sums: Sequence[Node], order: Sequence[int]) -> int | None:
        """The dim along which large sums are made part by part, so that threads can share the work: the outermost."""
        if not sums:
            return None
        shape = sums[0].inputs[0].shape
        outermost = next((d for d in order if shape[d] > 1), 0)
        summed = all(outermost in n.attrs["dims"] for n in sums)
        return outermost if summed and self.parts_pay(numel(shape), max(shape[outermost], 4)) else None

    def _total(self, node: Node, parts: Array) -> None:
        """The sum of the sums of the parts."""
        out, mode = self.result(node, self._direct(node, node.outputs[0]), None)
        self.code.append(added_up(parts, out, mode, named(node), TABLE[node.op].flops(node)))

    @staticmethod
    def _note(unit: Unit) -> str:
        names = [n.op for n in unit.nodes] or ["store"]
        origin = next((n.origin for n in reversed(unit.nodes) if n.origin), "")
        return f"{'·'.join(names[:8])}{'…' if len(names) > 8 else ''}  {origin}".rstrip()

    def _results(self, unit: Unit, needed: Sequence[Value], code: Registers, order: Sequence[int]) -> list[Result]:
        """The cluster's outputs: array, register, mode. First what is kept here, then what is stored elsewhere."""
        stored: list[Result] = []
        for value, store in unit.stores:
            where = self.target(store, value)
            if where is None:
                continue
            stored.append((where, code.register(value), int(store.add)))
            if value in code.inside and not store.add:
                self.env[value] = where
        made: list[Result] = []
        for v in needed:
            if v not in self.env:
                self.env[v] = self.fresh(unit.shape, order)
                made.append((self.env[v], code.register(v), 0))
        self._keep(unit)
        return made + stored

    def _needed(self, v: Value, unit: Unit) -> bool:
        """Whether anything outside the cluster reads the value (through views too), or the section keeps it."""
        if any(s.kind in HELD for value, s in unit.stores if value is v):
            return True
        for n in self.uses.get(v, ()):
            if TABLE[n.op].kernel == "view":
                if n.op != "stop_gradient" or self._needed(n.outputs[0], unit) or self._stored(n.outputs[0]):
                    return True
            elif self._biases(n) or any(home is not unit for home in self.homes.get(n, ())):
                return self._made_once(v, unit)
        return self._stored_elsewhere(v, unit)

    def _made_once(self, v: Value, unit: Unit) -> bool:
        """A lazy node has a copy in every cluster that reads it, so none of them writes it down."""
        maker = self.producer[self.alias.get(v, v)]
        return len(self.homes[maker]) == 1 or any(s is v for s, _ in unit.stores)

    def _biases(self, n: Node) -> bool:
        """Whether the addition was taken into a biased unit (or a sum), so that its operands are read elsewhere."""
        return n not in self.homes

    def _stored(self, v: Value) -> bool:
        return any(o is v for o in self.graph.outputs.values())

    def _stored_elsewhere(self, v: Value, unit: Unit) -> bool:
        return any(u is not unit and u.stores for u in self.storing.get(v, ()))

    def _keep(self, unit: Unit) -> None:
        for value, store in unit.stores:
            if store.kind in HELD:
                self.kept[store.kind, store.name] = self.array(value)

    # ---- products

    def _node(self, node: Node, into: Into, bias: Array | None = None) -> None:
        emitter = getattr(self, f"_{TABLE[node.op].kernel}")
        emitter(node, into) if bias is None else emitter(node, into, bias)

    def _sum(self, unit: Unit) -> None:
        assert unit.result is not None
        first = unit.nodes[0]
        self._node(first, self._direct(first, unit.result))
        out = self.env[first.outputs[0]]
        for node in unit.nodes[1:]:
            self._node(node, (out, True))
            self._pair()
        self.env[unit.result] = out

    def _biased(self, unit: Unit) -> None:
        assert unit.result is not None and unit.bias is not None
        node = unit.nodes[0]
        bias = self.array(unit.bias)
        bias = reshaped(bias, (numel(bias.shape),)) or self.reshape_copy(bias, (numel(bias.shape),))
        self._node(node, self._direct(node, unit.result), self.dense(bias))
        self.env[unit.result] = self.env[node.outputs[0]]

    def _onto(self, unit: Unit) -> None:
        """The first product is taken up by the base, those that follow by what is there then."""
        assert unit.result is not None and unit.onto is not None
        base, factor = self.array(unit.onto.base), unit.onto.factor
        number = self.constants.array(torch.tensor(1.0)) if factor is None else self.array(factor)
        into = self._direct(unit.nodes[0], unit.result, adding=False)
        order = memory_order(base.shape, base.strides) if is_dense(base) else None
        where = self.fresh(base.shape, order) if into is None else into[0]
        if not same_strides(where.shape, base.strides, where.strides):
            base = self.copied(base, memory_order(where.shape, where.strides))
        for node in unit.nodes:
            self._node(node, (where, False))
            if base is where and self._pair():
                continue
            self._take_up(base, number, unit.onto.sign)
            base = where
        self.env[unit.result] = where

    def _pair(self) -> bool:
        """Make of the last two instructions one, where these are products that lie alike and go to the same place."""
        if not enabled("pairs") or len(self.code) < 2:
            return False
        first, second = self.code[-2:]
        if (first.kernel, second.kernel) != ("gemm", "gemm") or first.ints[GEMM_PAIR] or second.ints[GEMM_BIAS]:
            return False
        alike = first.ints[:GEMM_MODE] == second.ints[:GEMM_MODE]
        if not alike or not _same_place(first.operands[2], second.operands[2]):
            return False
        first.operands += second.operands[:2]
        first.ints[GEMM_PAIR] = 1
        first.flops += second.flops
        self.code.pop()
        return True

    def _take_up(self, base: Array, number: Array, sign: int) -> None:
        """Let the product written last be added to, or taken from, an array that lies as its result does."""
        product = self.code[-1]
        product.ints[GEMM_MODE] = 2 if sign > 0 else 3
        product.operands += [base, number]
        product.flops += 2 * numel(base.shape)

    def _direct(self, node: Node, result: Value, *, adding: bool = True) -> Into:
        """Where an accumulating kernel may write a section output itself, instead of a store copying it there; with
        `adding` also where it adds to what is there."""
        if TABLE[node.op].kernel not in DIRECT or not enabled("direct"):
            return None
        for unit in self.storing.get(result, ()):
            if unit.nodes or not unit.stores or unit.stores[0][0] is not result:
                continue
            store = unit.stores[0][1]
            where = self.target(store, result)
            if where is None or (store.add and (self._uses(result) > 1 or not adding)):
                continue
            if not lies_in(where, NHWC if node.op in ("conv2d", "conv2d_dx") else range(len(where.shape))):
                continue
            unit.stores.clear()
            return where, store.add
        return None

    def _uses(self, v: Value) -> int:
        return len(self.uses.get(v, ())) + sum(o is v for o in self.graph.outputs.values())


def _same_place(a: Array, b: Array) -> bool:
    return a.buffer is b.buffer and a.byte_offset == b.byte_offset


def _sum_view(node: Node, out: Array, parted: int | None = None) -> Array:
    """The result of a sum, seen with the shape of what is summed: stride 0 where it adds up, unless in parts."""
    shape, dims = node.inputs[0].shape, node.attrs["dims"]
    kept = iter(dense_strides(node.outputs[0].shape))
    strides = [0 if d in dims else next(kept) for d in range(len(shape))]
    if parted is not None:
        strides[parted] = numel(node.outputs[0].shape)
    return viewed(out, shape, tuple(strides))
