"""Tasks side by side: a section that does `lanes` tasks at once, one in each lane of a vector.

Every value that differs from task to task gets a last dim of `lanes`, lying innermost in memory, and every op does what
it did along the other dims: a product of small matrices becomes a product of matrices of vectors, with no tail, no
packing and no transpose, and an instruction is called once where it was called `lanes` times. What all tasks share (the
initial parameters, hyper-parameters) stays as it is and is broadcast. The tensors of the call keep their task dimension
first; those that are read are laid out anew where a task begins, those that are written by a strided store.

This is `vmap` over the graph, with the batch last. Not every op has such a form: then there is no interleaved program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from metafast.graph import Builder, Input, Node, Shape, Value
from metafast.ops.pointwise import POINTWISE
from metafast.sweep import Section, Store

PER_TASK = ("support/", "query/", "fast/", "outputs/")  # leaves of the call with a task dimension
_SAME_ATTRS = {"slice", "pad", "concat", "sum", "amax", "cumsum", "log_softmax"}
_OF_ROWS = {"standardize", "project", "project_tangent"}  # their kernels see one block of reduced dims


class NotInterleaved(Exception):
    """An op of the sections has no form with a last dim of lanes."""


def per_task(leaf: str) -> bool:
    """Whether the leaf of that name has a task dimension."""
    return leaf.startswith(PER_TASK)


class Interleaving:
    """Rewrites sections for `lanes` tasks at once, `prologue` before those that read what it stored."""

    def __init__(self, lanes: int) -> None:
        self._lanes = lanes
        self._hoisted: dict[str, bool] = {}  # what the prologue stored: whether it differs from task to task

    def copy(self) -> Interleaving:
        """One that knows what this one has seen."""
        made = Interleaving(self._lanes)
        made._hoisted = self._hoisted.copy()
        return made

    def sections(self, sections: Mapping[str, Section]) -> dict[str, Section]:
        """All of them, in that order. Raises NotInterleaved where an op has no such form."""
        laid_out = _read_at_each_step(sections)
        return {name: self.section(s, laid_out if name == "prologue" else ()) for name, s in sections.items()}

    def section(self, section: Section, laid_out: Sequence[Input] = ()) -> Section:
        """One section, which lays out those leaves for all that follow it. Raises NotInterleaved."""
        writer = _Interleaver(section, self._lanes, self._hoisted)
        for leaf in laid_out:
            writer.lay_out(leaf)
        return writer.run()


def _read_at_each_step(sections: Mapping[str, Section]) -> list[Input]:
    """The leaves with a task dimension that the steps read: the prologue lays them out once for all of them."""
    steps = [section for name, section in sections.items() if name in ("inner", "meta")]
    leaves = {i.name: i for section in steps for i in section.graph.inputs if _laid_out(i)}
    return list(leaves.values())


def _laid_out(i: Input) -> bool:
    return i.role == "leaf" and per_task(i.name) and i.value.dtype == "real"


def _interleaved(leaf: str) -> str:
    return f"interleaved {leaf}"


@dataclass
class _Interleaver:
    section: Section
    lanes: int
    hoisted: dict[str, bool]
    b: Builder = field(default_factory=Builder)
    env: dict[Value, Value] = field(default_factory=dict)
    moving: set[Value] = field(default_factory=set)  # new values with a dim of lanes
    outputs: dict[str, Value] = field(default_factory=dict)
    stores: list[Store] = field(default_factory=list)

    def run(self) -> Section:
        graph = self.section.graph
        for i in graph.inputs:
            self.env[i.value] = self._input(i)
        for node in graph.nodes:
            self.b.origin = node.origin
            inputs = [self.env[v] for v in node.inputs]
            if any(v in self.moving for v in inputs):
                made = self._node(node, inputs)
                self.moving.update(made)
            else:
                made = self.b.again(node, tuple(inputs))
            self.env.update(zip(node.outputs, made, strict=True))
        self.b.origin = ""
        for store in self.section.stores:
            self._store(store, self.env[graph.outputs[store.output]])
        return Section(self.b.finish(self.outputs), tuple(self.stores))

    # -- inputs

    def lay_out(self, leaf: Input) -> None:
        """Keep the leaf, laid out lane by lane, for the sections that follow."""
        name = _interleaved(leaf.name)
        self.outputs[name] = self._leaf(leaf)
        self.stores.append(Store(name, "hoisted", name))
        self.hoisted[name] = True

    def _input(self, i: Input) -> Value:
        shape, dtype = i.value.shape, i.value.dtype
        moves = i.role in ("state", "adjoint", "spill", "kept") or (i.role == "hoisted" and self.hoisted[i.name])
        moves |= i.role == "call" and i.name == "weight"
        if i.role == "leaf" and per_task(i.name):
            return self._leaf(i)
        value = self.b.input(i.role, i.name, (*shape, self.lanes) if moves else shape, dtype)
        if moves:
            self.moving.add(value)
        return value

    def _leaf(self, i: Input) -> Value:
        """A leaf of every task, laid out lane by lane, once; labels stay as they lie."""
        shape, name = (*i.value.shape, self.lanes), _interleaved(i.name)
        if name in self.hoisted and name not in self.outputs:
            value = self.b.input("hoisted", name, shape)
        else:
            leaf = self.b.input("leaf", i.name, shape, i.value.dtype)
            value = self.b.op("interleave", leaf) if _laid_out(i) else leaf
        self.moving.add(value)
        return value

    # -- nodes

    def _node(self, node: Node, inputs: Sequence[Value]) -> tuple[Value, ...]:
        op, attrs, lanes = node.op, node.attrs, self.lanes
        if op == "one_hot":
            return (self._one_hot(node, inputs[0]),)
        if inputs[0].dtype != "real" and op not in ("reshape", "permute", "slice", "expand"):
            raise NotInterleaved(op)
        if op in POINTWISE or op == "stop_gradient":
            return self.b.ops(op, *map(self._aligned, inputs), **attrs)
        if op == "matmul" and len(node.inputs[0].shape) == 2:
            return self.b.ops("matmul_lanes", *map(self._aligned, inputs))
        if op in ("reshape", "expand"):
            return (self.b.op(op, inputs[0], shape=(*attrs["shape"], lanes)),)
        if op == "permute":
            return (self.b.op(op, inputs[0], dims=(*attrs["dims"], len(attrs["dims"]))),)
        if op in _SAME_ATTRS or (op in _OF_ROWS and len(node.inputs[0].shape) <= 2):
            return self.b.ops(op, *map(self._full, inputs), **attrs)
        raise NotInterleaved(op)

    def _one_hot(self, node: Node, labels: Value) -> Value:
        """The lanes of labels lie apart: one task after the other, then laid out."""
        (n,), lanes = node.inputs[0].shape, self.lanes
        flat = self.b.op("reshape", self.b.op("permute", labels, dims=(1, 0)), shape=(lanes * n,))
        made = self.b.op("one_hot", flat, **node.attrs)
        split = self.b.op("reshape", made, shape=(lanes, n, made.shape[1]))
        return self.b.op("interleave", self.b.op("permute", split, dims=(1, 2, 0)))

    def _aligned(self, v: Value) -> Value:
        """The value with a last dim of lanes, or of 1 where all tasks share it; a 0-dim constant needs none."""
        if v in self.moving or (not v.shape and self.b.constant_of(v) is not None):
            return v
        return self.b.op("reshape", v, shape=(*v.shape, 1))

    def _full(self, v: Value) -> Value:
        """The value with a last dim of lanes."""
        if v in self.moving:
            return v
        return self.b.op("expand", self.b.op("reshape", v, shape=(*v.shape, 1)), shape=(*v.shape, self.lanes))

    # -- stores

    def _store(self, store: Store, value: Value) -> None:
        if store.kind == "hoisted":
            self.hoisted[store.name] = value in self.moving
        elif store.kind == "gradient" and not per_task(store.name):
            value = self._full(value)
            value = self.b.op("sum", value, dims=(len(value.shape) - 1,))
        else:
            value = self._full(value)
        self.outputs[store.output] = value
        self.stores.append(store)


def interleaved_state(state: Mapping[str, Shape], lanes: int) -> dict[str, Shape]:
    """What one step hands to the next, for `lanes` tasks."""
    return {name: (*shape, lanes) for name, shape in state.items()}
