"""What everything that is emitted writes with: where values lie, new arrays, copies, instructions.

Layouts are a matter of strides alone. Convolutions and pools work on dense N,H,W,C; a pointwise cluster takes the
layout of its largest dense input; normalisations keep their input's layout where the reduced dims are one block of it;
everything that leaves the section is contiguous. Where an operand lies otherwise, `dense` copies it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from metafast.graph import Graph, Node, Shape, Value
from metafast.lower.arrays import (
    ACCUMULATOR,
    CONSTANT,
    ITEM,
    Array,
    Buffer,
    Instruction,
    broadcast_to,
    collapse,
    dense_strides,
    is_dense,
    lies_in,
    memory_order,
    permuted,
    reshaped,
    sliced,
)
from metafast.ops import TABLE, numel
from metafast.ops.shape import literal_tensor
from metafast.passes import enabled

MAX_OPERANDS = 32  # of one pointwise instruction: kPointwiseOperands in csrc/kernels/common/kernel.hpp
LEAST_PART = 1 << 12  # elements that a thread adds up at once; less is not worth a total
Into = tuple[Array, bool] | None  # where the caller wants the result, and whether it is added there
Result = tuple[Array, int, int]  # array, register, mode


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


class Writer:
    """The instructions of one section so far, and where each value lies; `known` places the section's inputs."""

    def __init__(self, graph: Graph, known: dict[Value, Array], constants: Constants) -> None:
        self.graph = graph
        self.env = dict(known)
        self.constants = constants
        self.item = constants.dtype.itemsize
        self.producer = graph.producers()
        self.code: list[Instruction] = []
        self.copies: dict[tuple[Array, tuple[int, ...] | None], Array] = {}

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
            return reshaped(a, node.attrs["shape"]) or self.reshape_copy(a, node.attrs["shape"])
        if node.op == "permute":
            return permuted(a, node.attrs["dims"])
        if node.op == "expand":
            return broadcast_to(a, node.attrs["shape"])
        return sliced(a, node.attrs) if node.op == "slice" else a

    def reshape_copy(self, a: Array, shape: Shape) -> Array:
        """The array in that shape, where no view has it."""
        out = reshaped(self.copied(a, None), shape)
        assert out is not None
        return out

    def copied(self, a: Array, order: Sequence[int] | None) -> Array:
        """A copy of the array, dense in that order: written at first use, for all that follow."""
        key = (a, None if order is None else tuple(order))
        if key not in self.copies or not enabled("copies"):
            out = self.copies[key] = self.fresh(a.shape, order)
            self.copy(a, out)
        return self.copies[key]

    def copy(self, src: Array, dst: Array, *, add: bool = False) -> None:
        """dst = src, or dst += src, element by element."""
        order = memory_order(dst.shape, dst.strides)
        self.pointwise([src], [(dst, 0, int(add))], [], 1, [], dst.shape, order, "copy")

    def layout(self, arrays: Sequence[Array], shape: Shape) -> tuple[int, ...]:
        """The order of dims of the first full dense input that is not plainly contiguous, else contiguous."""
        plain = tuple(range(len(shape)))
        for a in arrays if enabled("layout") else ():
            order = memory_order(shape, a.strides)
            if order != plain and is_dense(a):
                return order
        return plain

    def dense(self, a: Array, order: Sequence[int] | None = None) -> Array:
        """The array, dense in that order of dims; copied where it is not."""
        order = tuple(range(len(a.shape))) if order is None else order
        return a if lies_in(a, order) else self.copied(a, order)

    @staticmethod
    def parts_pay(elements: int, parts: int) -> bool:
        """Whether so many elements are added up part by part, which threads share, and the parts afterwards."""
        return enabled("parts") and elements >= LEAST_PART * parts

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
                named(node),
            )
        )

    def pointwise(
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
        """One pass over `shape`, walked in `order`: `ops` over `count` registers, of which inputs are the first."""
        if not results or numel(shape) == 0:
            return
        room = MAX_OPERANDS - len(inputs)
        if len(results) > room:  # computed again for the outputs that find no room
            for k in range(0, len(results), room):
                self.pointwise(inputs, results[k : k + room], ops, count, floats, shape, order, note, work)
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

    def result(self, node: Node, into: Into, order: Sequence[int] | None) -> tuple[Array, int]:
        """Where the node's first output goes, and the kernel's mode (1: add to what is there)."""
        v = node.outputs[0]
        where, add = into if into is not None else (self.fresh(v.shape, order), False)
        self.env[v] = where
        return where, int(add)


def named(node: Node) -> str:
    """The note of its instructions: the op, and the module it comes from."""
    return f"{node.op}  {node.origin}".rstrip()
