"""The operations of a pointwise cluster and the registers they work in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from metafast.graph import Node, Value
from metafast.lower.fuse import Unit
from metafast.passes import enabled


class Registers:
    """Registers of one cluster: inputs first, then results, reused once nothing more reads them."""

    def __init__(
        self,
        unit: Unit,
        alias: Mapping[Value, Value],
        producer: Mapping[Value, Node],
        opcodes: Mapping[str, int],
    ) -> None:
        self.alias, self.producer, self.opcodes = alias, producer, opcodes
        self.inside = {n.outputs[0] for n in unit.nodes}
        self.inputs: list[Value] = []
        self.floats: list[float] = []
        self.ops: list[int] = []
        self.where: dict[Value, int] = {}
        for n in unit.nodes:
            for v in n.inputs:
                self._outside(v)
        for v, _ in unit.stores:
            self._outside(v)
        self.count = len(self.inputs)

    def _outside(self, v: Value) -> None:
        v = self.alias.get(v, v)
        if v in self.inside or v in self.where:
            return
        n = self.producer.get(v)
        while n is not None and n.op in ("expand", "reshape"):
            n = self.producer.get(n.inputs[0])
        if n is not None and n.op == "const":
            self.floats.append(n.attrs["value"])
            self.where[v] = -len(self.floats)
        else:
            self.where[v] = len(self.inputs)
            self.inputs.append(v)

    def allocate(self, unit: Unit, read_at_end: Sequence[Value]) -> None:
        """Write the operations; what is stored or in `read_at_end` keeps its register."""
        kept = {self.alias.get(v, v) for v in (*(v for v, _ in unit.stores), *read_at_end)}
        operations = self._operations(unit, kept)
        last = {v: k for k, (_, _, args) in enumerate(operations) for v in args}
        free: list[int] = []
        for k, (op, out, args) in enumerate(operations):
            sources = [self.where[v] for v in args]
            dst = free.pop() if free else self.count
            self.count = max(self.count, dst + 1)
            self.where[out] = dst
            self.ops += [self.opcodes[op], dst, *(sources + [0, 0])[:3]]
            for v in set(args):
                if v in self.inside and last[v] == k and v not in kept:
                    free.append(self.where[v])
            if out not in last and out not in kept:
                free.append(dst)

    def _operations(self, unit: Unit, kept: set[Value]) -> list[tuple[str, Value, list[Value]]]:
        """Opcode, result and sources of each; a choice by `step(x)` reads x, and the mask is made if others read it."""
        signs = [n for n in unit.nodes if n.op == "step"] if enabled("masks") else []
        masks = {n.outputs[0]: self.alias.get(n.inputs[0], n.inputs[0]) for n in signs}
        found = []
        for n in unit.nodes:
            op, args = n.op, [self.alias.get(v, v) for v in n.inputs]
            if op == "where" and args[0] in masks:
                op, args[0] = "where_positive", masks[args[0]]
            found.append((op, n.outputs[0], args))
        read = kept.union(*(args for _, _, args in found))
        return [operation for operation in found if operation[1] in read or operation[1] not in masks]

    def register(self, v: Value) -> int:
        """The register that holds the value at the end; a constant gets one by a copy."""
        v = self.alias.get(v, v)
        r = self.where[v]
        if r < 0:
            self.ops += [self.opcodes["copy"], self.count, r, 0, 0]
            r = self.where[v] = self.count
            self.count += 1
        return r
