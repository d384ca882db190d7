"""Units to instructions: for each kernel stem one emitter that fixes layouts and writes the kernel's integers.

Layouts are a matter of strides alone. Convolutions and pools work on dense N,H,W,C; a pointwise cluster takes the
layout of its largest dense input; normalisations keep their input's layout where the reduced dims are one block of it;
everything that leaves the section is contiguous. Where an operand lies otherwise, `_dense` copies it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from metafast.graph import Node, Shape, Value
from metafast.lower.arrays import (
    ACCUMULATOR,
    CONSTANT,
    ITEM,
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
    permuted,
    reshaped,
    same_strides,
    sliced,
    viewed,
)
from metafast.lower.fuse import Unit, aliases, units
from metafast.lower.registers import Registers
from metafast.ops import TABLE, numel
from metafast.ops.shape import literal_tensor
from metafast.passes import enabled
from metafast.sweep import Section, Store

NHWC = (0, 2, 3, 1)
MAX_OPERANDS = 32  # of one pointwise instruction: kPointwiseOperands in csrc/kernels/common/kernel.hpp
Result = tuple[Array, int, int]  # array, register, mode
LEAST_PART = 1 << 12  # elements that a thread adds up at once; less is not worth a total
PIECES, LEAST_PIECE = 2, 1 << 11  # of a weight gradient; pixels for which another transform of it is next to nothing
GEMM_MODE, GEMM_BIAS, GEMM_PAIR = 13, 14, 15  # where they stand among the ints: csrc/kernels/cpu/gemm.hpp
DIRECT = {"matmul", "matmul_lanes", "conv2d", "reduce"}  # kernels that can write, or add, where the caller says


@dataclass
class Constants:
    """The program's literals: one block of bytes, every distinct array once."""

    dtype: torch.dtype
    data: bytearray = field(default_factory=bytearray)
    made: dict[bytes, Array] = field(default_factory=dict)

    def copy(self) -> Constants:
        """One that more is added to."""
        return Constants(self.dtype, self.data.copy(), self.made.copy())

    def array(self, tensor: torch.Tensor) -> Array:
        """Where that tensor lies among the constants."""
        raw = tensor.to(self.dtype).contiguous().numpy().tobytes()
        shape = tuple(tensor.shape)
        if raw not in self.made:
            offset = len(self.data)
            self.data += raw + b"\0" * (-len(raw) % 64)
            buffer = Buffer(len(raw), CONSTANT, offset)
            self.made[raw] = Array(buffer, shape, dense_strides(shape), self.dtype.itemsize)
        found = self.made[raw]
        return Array(found.buffer, shape, dense_strides(shape), found.itemsize)


HELD = ("hoisted", "kept")  # stores of values that later sections read where they were made


class Emitter:
    """Lowers one section. `known` places its inputs, `target` its stores (None: keep the value where it is made)."""

    def __init__(
        self,
        section: Section,
        known: dict[Value, Array],
        target: Callable[[Store, Value], Array | None],
        constants: Constants,
        opcodes: dict[str, int],
    ) -> None:
        self.section = section
        self.graph = section.graph
        self.env = dict(known)
        self.target = target
        self.constants = constants
        self.opcodes = opcodes
        self.item = constants.dtype.itemsize
        self.producer = self.graph.producers()
        self.code: list[Instruction] = []
        self.kept: dict[tuple[str, str], Array] = {}
        self.alias = aliases(self.graph, lambda node: node.op == "stop_gradient")
        self.filters: dict[tuple[Array, bool], Array] = {}
        self.copies: dict[tuple[Array, tuple[int, ...] | None], Array] = {}
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

    # ---- arrays

    def fresh(self, shape: Shape, order: Sequence[int] | None = None, dtype: str = "real") -> Array:
        """A new dense array in the arena."""
        item = ITEM.get(dtype, self.item)
        return Array(Buffer(numel(shape) * item), shape, dense_strides(shape, order), item)

    def array(self, v: Value) -> Array:
        """Where the value lies; views are worked out here, and a reshape that strides cannot express is copied."""
        found = self.env.get(v)
        if found is None:
            found = self.env[v] = self._view(self.producer[v])
        return found

    def _view(self, node: Node) -> Array:
        if node.op == "const":
            return self.constants.array(torch.tensor(node.attrs["value"], dtype=torch.float64))
        if node.op == "literal":
            return self.constants.array(literal_tensor(node.attrs, torch.float64))
        a = self.array(node.inputs[0])
        if node.op == "reshape":
            return reshaped(a, node.attrs["shape"]) or self._reshape_copy(a, node.attrs["shape"])
        if node.op == "permute":
            return permuted(a, node.attrs["dims"])
        if node.op == "expand":
            return broadcast_to(a, node.attrs["shape"])
        return sliced(a, node.attrs) if node.op == "slice" else a

    def _reshape_copy(self, a: Array, shape: Shape) -> Array:
        out = reshaped(self._copied(a, None), shape)
        assert out is not None
        return out

    def _copied(self, a: Array, order: Sequence[int] | None) -> Array:
        """The array, dense in that order: written at first use, for all that follow."""
        key = (a, None if order is None else tuple(order))
        if key not in self.copies or not enabled("copies"):
            out = self.copies[key] = self.fresh(a.shape, order)
            self.copy(a, out)
        return self.copies[key]

    def copy(self, src: Array, dst: Array, *, add: bool = False) -> None:
        """dst = src, or dst += src, element by element."""
        order = memory_order(dst.shape, dst.strides)
        self._emit_pointwise([src], [(dst, 0, int(add))], [], 1, [], dst.shape, order, "copy")

    def dense(self, a: Array, order: Sequence[int] | None = None) -> Array:
        """The array, dense in that order of dims; copied where it is not."""
        order = tuple(range(len(a.shape))) if order is None else order
        return a if lies_in(a, order) else self._copied(a, order)

    def emit(
        self,
        node: Node,
        kernel: str,
        operands: list[Array],
        writes: int,
        ints: list[int],
        floats: Sequence[float] = (),
    ) -> None:
        """Append one instruction whose last `writes` operands are written."""
        n = len(operands)
        self.code.append(
            Instruction(
                kernel,
                operands,
                list(range(n - writes, n)),
                ints,
                list(floats),
                TABLE[node.op].flops(node),
                _named(node),
            )
        )

    # ---- pointwise

    def _cluster(self, unit: Unit) -> None:
        if not unit.nodes and not unit.stores:
            return
        inside = [n.outputs[0] for n in unit.nodes]
        code = Registers(unit, self.alias, self.producer, self.opcodes)
        arrays = [broadcast_to(self.array(v), unit.shape) for v in code.inputs]
        order = self._layout(arrays, unit.shape)
        sums = self._adding(unit, order, arrays)
        for n in unit.sums:
            self.homes[n] = [unit] if n in sums else [Unit("node")]  # made by another instruction
        needed = [v for v in inside if self._needed(v, unit)]
        code.allocate(unit, [*needed, *(n.inputs[0] for n in sums)])
        parted = self._parted(sums, order)
        parts = {} if parted is None else {n: self.fresh((unit.shape[parted], *n.outputs[0].shape)) for n in sums}
        results = self._results(unit, needed, code, order)
        for n in sums:
            out, mode = (parts[n], 0) if n in parts else self._result(n, self._direct(n, n.outputs[0]), None)
            results.append((_sum_view(n, out, parted), code.register(n.inputs[0]), SUM + mode))
        self._emit_pointwise(
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
        if not sums or not enabled("parts"):
            return None
        shape = sums[0].inputs[0].shape
        outermost = next((d for d in order if shape[d] > 1), 0)
        summed = all(outermost in n.attrs["dims"] for n in sums)
        return outermost if summed and numel(shape) >= LEAST_PART * max(shape[outermost], 4) else None

    def _total(self, node: Node, parts: Array) -> None:
        """The sum of the sums of the parts."""
        out, mode = self._result(node, self._direct(node, node.outputs[0]), None)
        self.code.append(added_up(parts, out, mode, _named(node), TABLE[node.op].flops(node)))

    @staticmethod
    def _note(unit: Unit) -> str:
        names = [n.op for n in unit.nodes] or ["store"]
        origin = next((n.origin for n in reversed(unit.nodes) if n.origin), "")
        return f"{'·'.join(names[:8])}{'…' if len(names) > 8 else ''}  {origin}".rstrip()

    def _layout(self, arrays: Sequence[Array], shape: Shape) -> tuple[int, ...]:
        """The order of dims of the first full dense input that is not plainly contiguous, else contiguous."""
        plain = tuple(range(len(shape)))
        for a in arrays if enabled("layout") else ():
            order = memory_order(shape, a.strides)
            if order != plain and is_dense(a):
                return order
        return plain

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

    def _emit_pointwise(
        self,
        inputs: list[Array],
        results: Sequence[Result],
        ops: list[int],
        count: int,
        floats: list[float],
        shape: Shape,
        order: Sequence[int],
        note: str,
        work: int = 0,
    ) -> None:
        if not results or numel(shape) == 0:
            return
        room = MAX_OPERANDS - len(inputs)
        if len(results) > room:  # computed again for the outputs that find no room
            for k in range(0, len(results), room):
                self._emit_pointwise(inputs, results[k : k + room], ops, count, floats, shape, order, note, work)
            return
        outputs, regs, modes = [r[0] for r in results], [r[1] for r in results], [r[2] for r in results]
        operands: list[Array] = [*inputs, *outputs]
        strides = [[a.strides[d] for d in order] for a in operands]
        dims, strides = collapse(tuple(shape[d] for d in order), strides)
        if not dims:  # one element, which may stand in a row of others (see bundle.py)
            dims, strides = [1], [[int(a.buffer.space is None or a.buffer.space <= ACCUMULATOR)] for a in operands]
        ints = [len(dims), len(inputs), len(outputs), len(ops) // 5, count, *dims]
        ints += [s for each in strides for s in each] + regs + modes + ops + [int(enabled("code"))]
        writes = list(range(len(inputs), len(operands)))
        flops = float(work * numel(shape))
        self.code.append(Instruction("pointwise", operands, writes, ints, floats, flops, note))

    # ---- kernels

    def _node(self, node: Node, into: tuple[Array, bool] | None, bias: Array | None = None) -> None:
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
        bias = reshaped(bias, (numel(bias.shape),)) or self._reshape_copy(bias, (numel(bias.shape),))
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
            base = self._copied(base, memory_order(where.shape, where.strides))
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

    def _direct(self, node: Node, result: Value, *, adding: bool = True) -> tuple[Array, bool] | None:
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

    def _result(self, node: Node, into: tuple[Array, bool] | None, order: Sequence[int] | None) -> tuple[Array, int]:
        """Where the node's first output goes, and the kernel's mode (1: add to what is there)."""
        v = node.outputs[0]
        where, add = into if into is not None else (self.fresh(v.shape, order), False)
        self.env[v] = where
        return where, int(add)

    def _matmul(self, node: Node, into: tuple[Array, bool] | None, bias: Array | None = None) -> None:
        a, b = (self._batched(self.array(v)) for v in node.inputs)
        out, mode = self._result(node, into, None)
        c = reshaped(out, (a.shape[0], *out.shape[-2:]))
        assert c is not None
        batch, m, k = a.shape
        n = b.shape[2]
        ints = [batch, m, n, k, *a.strides, *b.strides, *c.strides, mode]
        self._emit_biased(node, "gemm", [a, b, c], 1, ints, bias)
        self.code[-1].ints.append(0)

    def _matmul_lanes(self, node: Node, into: tuple[Array, bool] | None) -> None:
        lanes = node.outputs[0].shape[2]
        a, b = (broadcast_to(x, (*x.shape[:2], lanes)) for x in map(self.array, node.inputs))
        c, mode = self._result(node, into, None)
        m, n, _ = c.shape
        last_first = [(x.strides[2], *x.strides[:2]) for x in (a, b, c)]
        ints = [lanes, m, n, a.shape[1], *(s for strides in last_first for s in strides), mode, 0, 0]
        self.emit(node, "gemm", [a, b, c], 1, ints)

    def _emit_biased(
        self, node: Node, kernel: str, operands: list[Array], writes: int, ints: list[int], bias: Array | None
    ) -> None:
        """Kernels that end (outputs, [an operand more]) and (flag of that operand)."""
        self.emit(node, kernel, operands, writes, [*ints, int(bias is not None)])
        if bias is not None:
            self.code[-1].operands.append(bias)

    def _batched(self, a: Array) -> Array:
        """As (batch, rows, columns)."""
        batch = numel(a.shape[:-2])
        return reshaped(a, (batch, *a.shape[-2:])) or self._reshape_copy(a, (batch, *a.shape[-2:]))

    def _conv2d(self, node: Node, into: tuple[Array, bool] | None, bias: Array | None = None) -> None:
        p, q = (self.array(v) for v in node.inputs)
        y = node.outputs[0].shape
        if node.op == "conv2d":
            x_shape, w_shape, y_shape = p.shape, q.shape, y
            p = self.dense(p, NHWC)
        elif node.op == "conv2d_dx":
            x_shape, w_shape, y_shape = y, q.shape, p.shape
            p = self.dense(p, NHWC)
        else:
            x_shape, w_shape, y_shape = p.shape, y, q.shape
            p, q = self.dense(p, NHWC), self.dense(q, NHWC)
        out, mode = self._result(node, into, None if node.op == "conv2d_dw" else NHWC)
        w = out if node.op == "conv2d_dw" else q
        ints = [x_shape[0], *x_shape[2:], x_shape[1], *w_shape[:1], *w_shape[2:]]
        ints += [*node.attrs["stride"], *node.attrs["padding"], *node.attrs["dilation"], *y_shape[2:], *w.strides]
        kernel = {"conv2d": "conv_fwd", "conv2d_dx": "conv_dx", "conv2d_dw": "conv_dw"}[node.op]
        winograd = int(enabled("winograd"))
        if winograd and self._by_winograd(node, ints):
            if node.op == "conv2d_dw":
                return self._conv2d_dw_in_pieces(node, [p, q], ints, out, mode)
            q, winograd = self._filters(node, q, ints), 2
        self._emit_biased(node, kernel, [p, q, out], 1, [*ints, mode, winograd], bias)

    def _by_winograd(self, node: Node, ints: Sequence[int]) -> bool:
        """Whether the kernel takes Winograd's form, whose filters are transformed once for all that read them."""
        from metafast import _C

        n, h, w, c, o, kh, kw, sh, sw, _, _, dh, dw, oh, ow = ints[:15]
        if self.item != 4 or (kh, kw) != (3, 3) or {sh, sw, dh, dw} != {1}:
            return False
        return _C.winograd_pays(h, w, n, o, c) if node.op == "conv2d_dx" else _C.winograd_pays(oh, ow, n, c, o)

    def _filters(self, node: Node, w: Array, ints: Sequence[int]) -> Array:
        """The weights' filters, transformed: once for all convolutions that read them."""
        from metafast import _C

        adjoint = node.op == "conv2d_dx"
        key = (w, adjoint)
        if key not in self.filters or not enabled("copies"):
            c, o = ints[3:5]
            many = _C.winograd_filter_elements(*((o, c) if adjoint else (c, o)))
            out = self.filters[key] = self.fresh((many,))
            self.emit(node, "winograd_filters", [w, out], 1, [*ints, 0, 0, 0, int(adjoint)])
            self.code[-1].flops, self.code[-1].note = 0.0, f"filters  {node.origin}".rstrip()
        return self.filters[key]

    def _conv2d_dw_in_pieces(
        self, node: Node, operands: list[Array], ints: Sequence[int], out: Array, mode: int
    ) -> None:
        """Of shares of the images, which threads then have for their own; added afterwards."""
        pieces = PIECES if enabled("parts") and ints[0] * ints[13] * ints[14] >= LEAST_PIECE and ints[0] > 1 else 1
        if pieces == 1 or not is_dense(out):
            return self.emit(node, "conv_dw", [*operands, out], 1, [*ints, mode, 1, 0])
        parts = self.fresh((pieces, numel(out.shape)))
        self.emit(node, "conv_dw", [*operands, parts], 1, [*ints, 0, 1, pieces])
        self.code.append(added_up(parts, out, mode, _named(node)))

    def _reduce(self, node: Node, into: tuple[Array, bool] | None) -> None:
        x = self.array(node.inputs[0])
        order = memory_order(x.shape, x.strides)
        dims = node.attrs["dims"]
        kept, red = [d for d in order if d not in dims], [d for d in order if d in dims]
        names = [d for d in range(len(x.shape)) if d not in dims]
        out, mode = self._result(node, into, [names.index(d) for d in kept])
        k_dims, (k_in, k_out) = collapse(
            tuple(x.shape[d] for d in kept),
            [[x.strides[d] for d in kept], [out.strides[names.index(d)] for d in kept]],
        )
        r_dims, (r_in,) = collapse(tuple(x.shape[d] for d in red), [[x.strides[d] for d in red]])
        ints = [len(k_dims), len(r_dims), *k_dims, *r_dims, *k_in, *r_in, *k_out, mode, int(node.op == "amax")]
        self.emit(node, "reduce", [x, out], 1, ints, [1.0])

    # -- kernels that see (outer, reduce, inner)

    def _blocked(self, a: Array, dims: Sequence[int]) -> tuple[Array, tuple[int, ...], tuple[int, int, int]]:
        """The array in a layout where `dims` are one block of memory: (array, order, (outer, reduce, inner))."""
        order = memory_order(a.shape, a.strides)
        if not (is_dense(a) and _block(a.shape, order, dims)):
            kept = [d for d in range(len(a.shape)) if d not in dims]
            order = NHWC if len(a.shape) == 4 and kept == [1] else (*kept, *dims)
            a = self._copied(a, order)
        at = [i for i, d in enumerate(order) if d in dims and a.shape[d] > 1]
        lo, hi = (at[0], at[-1] + 1) if at else (len(order), len(order))
        sizes = [a.shape[d] for d in order]
        return a, order, (numel(tuple(sizes[:lo])), numel(tuple(sizes[lo:hi])), numel(tuple(sizes[hi:])))

    @staticmethod
    def _kept_order(order: Sequence[int], dims: Sequence[int]) -> list[int]:
        names = [d for d in range(len(order)) if d not in dims]
        return [names.index(d) for d in order if d not in dims]

    def _stat(self, v: Value, order: Sequence[int], dims: Sequence[int]) -> Array:
        return self.dense(self.array(v), self._kept_order(order, dims))

    def _standardize(self, node: Node, _: tuple[Array, bool] | None) -> None:
        dims = node.attrs["dims"]
        x, order, sizes = self._blocked(self.array(node.inputs[0]), dims)
        outs = [self.fresh(x.shape, order)]
        outs += [self.fresh(v.shape, self._kept_order(order, dims)) for v in node.outputs[1:]]
        self.env.update(zip(node.outputs, outs, strict=True))
        self.emit(node, "standardize", [x, *outs], 4, list(sizes), [node.attrs["eps"]])

    def _moments(self, node: Node, _: tuple[Array, bool] | None) -> None:
        dims = node.attrs["dims"]
        x, order, (outer, many, inner) = self._blocked(self.array(node.inputs[0]), dims)
        pieces = self._pieces(x, order, many) if outer == 1 else 1
        each = [self.fresh((outer * pieces, inner)) for _ in range(2)]
        outs = [self.fresh(v.shape, self._kept_order(order, dims)) for v in node.outputs]
        self.env.update(zip(node.outputs, outs, strict=True))
        self.emit(node, "moments", [x, *each], 2, [outer * pieces, many // pieces, inner])
        self.emit(node, "join_moments", [*each, *outs], 3, [outer, pieces, inner], [node.attrs["eps"]])

    def _pieces(self, x: Array, order: Sequence[int], many: int) -> int:
        """In how many pieces, along the outermost dim, moments are taken, so that threads can share them."""
        pieces = next((x.shape[d] for d in order if x.shape[d] > 1), 1)
        worth = many % pieces == 0 and numel(x.shape) >= LEAST_PART * pieces
        return pieces if worth and enabled("parts") else 1

    def _project(self, node: Node, _: tuple[Array, bool] | None) -> None:
        v, xhat, rstd = node.inputs
        dims = node.attrs["dims"]
        x, order, sizes = self._blocked(self.array(xhat), dims)
        ins = [self.dense(self.array(v), order), x, self._stat(rstd, order, dims)]
        outs = [self.fresh(x.shape, order), self.fresh(node.outputs[1].shape, self._kept_order(order, dims))]
        self.env.update(zip(node.outputs, outs, strict=True))
        self.emit(node, "project", [*ins, *outs], 2, [*sizes, 0])

    def _project_tangent(self, node: Node, _: tuple[Array, bool] | None) -> None:
        v, xhat, xhat_dot, rstd, corr = node.inputs
        dims = node.attrs["dims"]
        x, order, sizes = self._blocked(self.array(xhat), dims)
        ins = [self.dense(self.array(v), order), x, self.dense(self.array(xhat_dot), order)]
        ins += [self._stat(rstd, order, dims), self._stat(corr, order, dims)]
        out = self.env[node.outputs[0]] = self.fresh(x.shape, order)
        self.emit(node, "project_tangent", [*ins, out], 1, [*sizes, 0])

    def _log_softmax(self, node: Node, _: tuple[Array, bool] | None) -> None:
        x, order, sizes = self._blocked(self.array(node.inputs[0]), (node.attrs["dim"],))
        out = self.env[node.outputs[0]] = self.fresh(x.shape, order)
        self.emit(node, "log_softmax", [x, out], 1, list(sizes))

    def _cumsum(self, node: Node, _: tuple[Array, bool] | None) -> None:
        x, order, sizes = self._blocked(self.array(node.inputs[0]), (node.attrs["dim"],))
        out = self.env[node.outputs[0]] = self.fresh(x.shape, order)
        self.emit(node, "cumsum", [x, out], 1, [*sizes, int(node.attrs["reverse"])])

    # -- pools

    def _max_pool(self, node: Node, _: tuple[Array, bool] | None) -> None:
        x = self.dense(self.array(node.inputs[0]), NHWC)
        y, idx = (self.fresh(v.shape, NHWC, v.dtype) for v in node.outputs)
        self.env.update(zip(node.outputs, (y, idx), strict=True))
        a = node.attrs
        ints = [*_nhwc(x.shape), *a["kernel"], *a["stride"], *a["padding"], *a["dilation"], *y.shape[2:]]
        sign = self.dense(self.array(node.inputs[1])) if len(node.inputs) > 1 else None
        self._emit_biased(node, "max_pool", [x, y, idx], 2, ints, sign)

    def _pool_gather(self, node: Node, _: tuple[Array, bool] | None) -> None:
        x = self.dense(self.array(node.inputs[0]), NHWC)
        idx = self.array(node.inputs[1])
        y = self.env[node.outputs[0]] = self.fresh(node.outputs[0].shape, NHWC)
        self.emit(node, "pool_gather", [x, idx, y], 1, [*_nhwc(x.shape), *y.shape[2:]])

    def _pool_scatter(self, node: Node, _: tuple[Array, bool] | None) -> None:
        dy = self.dense(self.array(node.inputs[0]), NHWC)
        idx = self.array(node.inputs[1])
        dx = self.env[node.outputs[0]] = self.fresh(node.outputs[0].shape, NHWC)
        self.emit(node, "pool_scatter", [dy, idx, dx], 1, [*_nhwc(dx.shape), *dy.shape[2:], 0])

    def _average(self, node: Node, x_shape: Shape, y_shape: Shape) -> None:
        a = node.attrs
        src = self.dense(self.array(node.inputs[0]), NHWC)
        out = self.env[node.outputs[0]] = self.fresh(node.outputs[0].shape, NHWC)
        ints = [*_nhwc(x_shape), *a["kernel"], *a["stride"], *a["padding"], *y_shape[2:]]
        self.emit(node, node.op, [src, out], 1, [*ints, int(a["count_include_pad"]), a["divisor"], 0])

    def _avg_pool(self, node: Node, _: tuple[Array, bool] | None) -> None:
        self._average(node, node.inputs[0].shape, node.outputs[0].shape)

    def _avg_pool_adj(self, node: Node, _: tuple[Array, bool] | None) -> None:
        self._average(node, node.outputs[0].shape, node.inputs[0].shape)

    # -- moving elements

    def _interleave(self, node: Node, _: tuple[Array, bool] | None) -> None:
        a = self.array(node.inputs[0])
        self.env[node.outputs[0]] = self.fresh(a.shape)
        self.copy(a, self.env[node.outputs[0]])

    def _one_hot(self, node: Node, _: tuple[Array, bool] | None) -> None:
        labels = self.array(node.inputs[0])
        out = self.env[node.outputs[0]] = self.fresh(node.outputs[0].shape)
        a = node.attrs
        real = int(node.inputs[0].dtype == "real")
        ints = [*out.shape, a["ignore_index"], *labels.strides, real, int(a["wraps"])]
        self.emit(node, "one_hot", [labels, out], 1, ints)

    def _pad(self, node: Node, _: tuple[Array, bool] | None) -> None:
        x = self.array(node.inputs[0])
        out = self.env[node.outputs[0]] = self.fresh(node.outputs[0].shape, memory_order(x.shape, x.strides))
        self.emit(node, "fill", [out], 1, [numel(out.shape)], [0.0])
        self.copy(x, sliced(out, node.attrs))

    def _concat(self, node: Node, _: tuple[Array, bool] | None) -> None:
        parts = [self.array(v) for v in node.inputs]
        order = self._layout([p for p in parts if is_dense(p)], parts[0].shape)
        out = self.env[node.outputs[0]] = self.fresh(node.outputs[0].shape, order)
        dim, at = node.attrs["dim"], 0
        for p in parts:
            end = at + p.shape[dim]
            self.copy(p, sliced(out, {"dim": dim, "start": at, "stop": end, "step": 1}))
            at = end


def _named(node: Node) -> str:
    return f"{node.op}  {node.origin}".rstrip()


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


def _nhwc(shape: Shape) -> list[int]:
    n, c, h, w = shape
    return [n, h, w, c]


def _block(shape: Shape, order: Sequence[int], dims: Sequence[int]) -> bool:
    """Whether the reduced dims are neighbours in memory (dims of size 1 aside)."""
    at = [i for i, d in enumerate(d for d in order if shape[d] > 1) if d in dims]
    return not at or at[-1] - at[0] + 1 == len(at)
