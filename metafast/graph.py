"""The Graph: a loss, a gradient, an update or a tangent of *one task*, as a straight-line program over typed values.

Grammar::

    graph  ::= inputs nodes outputs
    input  ::= role name value              role: where the value comes from (param, shared, support, ...)
    node   ::= values = op(values; attrs)   op: a row of `metafast.ops`; attrs: hashable
    value  ::= shape dtype                  dtype: "real" (the program's float), "int" (labels), "index" (pool winners)

Values are compared by identity and assigned once; nodes stand in an order in which every value is defined before it is
used. Truth values are real 0 and 1. A pass reads one graph and writes another through `Builder`, whose `op` infers
shapes, folds constants, applies the row's identities and returns the value that already exists for an equal node, so
that common subexpressions and algebraic noise never enter a graph. Every pass ends in `Builder.finish`, which drops
dead nodes and verifies their order; that shapes are right holds by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from metafast.ops.table import Op

TABLE: dict[str, Op] = {}  # what ops exist; metafast.ops writes the rows

Shape = tuple[int, ...]
Attrs = Mapping[str, Any]


class Value:
    """One array of the program: a shape and a dtype ("real", "int" or "index"); compared by identity."""

    __slots__ = ("dtype", "shape")

    def __init__(self, shape: Shape, dtype: str = "real") -> None:
        self.shape = shape
        self.dtype = dtype

    def __repr__(self) -> str:
        return f"Value({'×'.join(map(str, self.shape)) or '()'} {self.dtype})"


@dataclass(frozen=True, eq=False)
class Node:
    """`outputs = op(inputs; attrs)`; `origin` says which module and line of the user it came from. Nodes of one `key`
    compute the same."""

    op: str
    inputs: tuple[Value, ...]
    attrs: Attrs
    outputs: tuple[Value, ...]
    origin: str
    key: Any


@dataclass(frozen=True, eq=False)
class Input:
    """A value that comes from outside: `role` says whence, `name` which one."""

    role: str
    name: str
    value: Value


@dataclass(frozen=True, eq=False)
class Graph:
    """Inputs by role and name, nodes in order, outputs by name."""

    inputs: tuple[Input, ...]
    nodes: tuple[Node, ...]
    outputs: Mapping[str, Value]

    def input(self, role: str, name: str) -> Value | None:
        """The value of that input, or None where the graph does not read it."""
        return next((i.value for i in self.inputs if i.role == role and i.name == name), None)

    def producers(self) -> dict[Value, Node]:
        """Which node defines each value (inputs are absent)."""
        return {v: n for n in self.nodes for v in n.outputs}

    def __str__(self) -> str:
        return show(self)


class GraphError(AssertionError):
    """A pass wrote a graph that breaks the grammar: a bug in metafast, never the user's fault."""


def verify(graph: Graph) -> Graph:
    """Check that every value is defined once and before use. Shapes need no second look: a node comes to be in
    `Builder.ops` alone, which gives its outputs what the op table infers."""
    defined = {i.value for i in graph.inputs}
    if len(defined) != len(graph.inputs):
        raise GraphError("an input value is declared twice")
    for k, node in enumerate(graph.nodes):
        if not defined.issuperset(node.inputs):
            raise GraphError(f"node {k} ({node.op}): reads a value that is not defined before it")
        if not defined.isdisjoint(node.outputs):
            raise GraphError(f"node {k} ({node.op}): assigns a value twice")
        defined.update(node.outputs)
    if missing := [name for name, v in graph.outputs.items() if v not in defined]:
        raise GraphError(f"outputs {missing} are never defined")
    return graph


def show(graph: Graph) -> str:
    """The graph as text: one line an input, a node and an output."""
    names: dict[Value, str] = {}

    def name(v: Value) -> str:
        return names.setdefault(v, f"%{len(names)}")

    def typed(v: Value) -> str:
        kind = "" if v.dtype == "real" else f" {v.dtype}"
        return f"{name(v)}:{'×'.join(map(str, v.shape)) or '()'}{kind}"

    lines = [f"  {typed(i.value):<24} = {i.role} {i.name}" for i in graph.inputs]
    for n in graph.nodes:
        attrs = ", ".join(f"{k}={_short(v)}" for k, v in n.attrs.items())
        args = ", ".join(name(v) for v in n.inputs)
        left = ", ".join(typed(v) for v in n.outputs)
        tail = f"    # {n.origin}" if n.origin else ""
        lines.append(f"  {left:<24} = {n.op}({args}{'; ' if attrs and args else ''}{attrs}){tail}")
    lines += [f"  return {key} = {name(v)}" for key, v in graph.outputs.items()]
    return "\n".join(lines)


def form(graph: Graph) -> tuple[Any, ...]:
    """A hashable value, equal for graphs that are the same but for the identity of their values."""
    numbers: dict[Value, int] = {}

    def declared(values: Iterable[Value]) -> tuple[Any, ...]:
        return tuple([(numbers.setdefault(v, len(numbers)), v.shape, v.dtype) for v in values])

    inputs = tuple([(i.role, i.name, *declared([i.value])) for i in graph.inputs])
    nodes = tuple(
        [(n.op, n.origin, n.key[2], tuple([numbers[v] for v in n.inputs]), declared(n.outputs)) for n in graph.nodes]
    )
    return inputs, nodes, tuple([(name, numbers[v]) for name, v in graph.outputs.items()])


def _exact(attrs: Attrs) -> tuple[Any, ...]:
    """The attributes as part of a key: 0.0 and -0.0 are equal, and not the same."""
    return tuple(sorted([(name, value if value else repr(value)) for name, value in attrs.items()]))


def _short(attr: Any) -> str:
    return f"<{len(attr)} bytes>" if isinstance(attr, bytes) else str(attr)


def evaluate(graph: Graph, values: Mapping[tuple[str, str], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run the graph with PyTorch, one task, one node at a time: what passes are tested with (not the oracle).

    **Arguments:** `values` maps (role, name) to a tensor of the declared shape. **Returns** the outputs by name.
    """
    env: dict[Value, torch.Tensor] = {i.value: values[i.role, i.name] for i in graph.inputs}
    real = next((t.dtype for t in env.values() if t.is_floating_point()), torch.float64)
    for node in graph.nodes:
        outs = TABLE[node.op].evaluate([env[v] for v in node.inputs], {**node.attrs, "dtype": real})
        env.update(zip(node.outputs, outs, strict=True))
    return {name: env[v] for name, v in graph.outputs.items()}


@dataclass
class Builder:
    """Writes one graph. `op` is the only way a node comes to be."""

    inputs: list[Input] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    origin: str = ""
    _made: dict[Any, tuple[Value, ...]] = field(default_factory=dict)
    _producer: dict[Value, Node] = field(default_factory=dict)
    _named: dict[tuple[str, str], Value] = field(default_factory=dict)

    def input(self, role: str, name: str, shape: Shape, dtype: str = "real") -> Value:
        """The input of that role and name, declared at first mention."""
        value = self._named.get((role, name))
        if value is None:
            value = self._named[role, name] = Value(tuple(shape), dtype)
            self.inputs.append(Input(role, name, value))
        elif value.shape != tuple(shape) or value.dtype != dtype:
            raise GraphError(f"input {role} {name} is {value}, asked for {shape} {dtype}")
        return value

    def same(self, role: str, name: str, value: Value) -> Value:
        """The input of that role and name: the given value itself where it is declared now."""
        if (role, name) not in self._named:
            self._named[role, name] = value
            self.inputs.append(Input(role, name, value))
        return self.input(role, name, value.shape, value.dtype)

    def op(self, op: str, *inputs: Value, **attrs: Any) -> Value:
        """The first output of `op(inputs; attrs)`."""
        return self.ops(op, *inputs, **attrs)[0]

    def ops(self, op: str, *inputs: Value, **attrs: Any) -> tuple[Value, ...]:
        """All outputs of `op(inputs; attrs)`: simplified, or found, or new."""
        row = TABLE[op]
        if row.simplify is not None and (simpler := row.simplify(self, inputs, attrs)) is not None:
            return (simpler,)
        key = (op, inputs, _exact(attrs) if attrs else ())
        found = self._made.get(key)
        if found is None:
            found = tuple([Value(s, d) for s, d in row.infer(inputs, attrs)])
            self._write(Node(op, inputs, attrs, found, self.origin, key))
        return found

    def again(self, node: Node, inputs: tuple[Value, ...]) -> tuple[Value, ...]:
        """The outputs of a node of another graph on those inputs; where they are its own, the node goes as it is."""
        if inputs != node.inputs:
            self.origin = node.origin
            return self.ops(node.op, *inputs, **node.attrs)
        found = self._made.get(node.key)
        if found is None:
            self._write(node)
        return node.outputs if found is None else found

    def _write(self, node: Node) -> None:
        self.nodes.append(node)
        self._made[node.key] = node.outputs
        for v in node.outputs:
            self._producer[v] = node

    def const(self, value: float) -> Value:
        """A 0-dim constant."""
        return self.op("const", value=float(value))

    def producer(self, value: Value) -> Node | None:
        """The node that made the value; None for an input."""
        return self._producer.get(value)

    def constant_of(self, value: Value) -> float | None:
        """The number, where the value is a 0-dim constant."""
        node = self._producer.get(value)
        return node.attrs["value"] if node is not None and node.op == "const" else None

    def finish(self, outputs: Mapping[str, Value], *, keep_inputs: bool = False) -> Graph:
        """The graph of what the outputs need."""
        return closed(self.inputs, self.nodes, outputs, keep_inputs=keep_inputs)


def closed(
    inputs: Sequence[Input], nodes: Sequence[Node], outputs: Mapping[str, Value], *, keep_inputs: bool = False
) -> Graph:
    """A verified graph of those inputs and nodes that the outputs need."""
    nodes = live_nodes(nodes, outputs.values())
    read = {v for n in nodes for v in n.inputs}.union(outputs.values())
    return verify(Graph(tuple(i for i in inputs if keep_inputs or i.value in read), tuple(nodes), dict(outputs)))


def live_nodes(nodes: Sequence[Node], outputs: Iterable[Value]) -> list[Node]:
    """Those nodes, in order, that some output depends on."""
    wanted = set(outputs)
    kept: list[Node] = []
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.outputs):
            wanted.update(node.inputs)
            kept.append(node)
    kept.reverse()
    return kept


def copy_into(
    b: Builder,
    graph: Graph,
    bind: Callable[[Input], Value],
) -> dict[Value, Value]:
    """Write the graph's nodes into `b`, each input replaced by `bind(input)`; returns old value → new value.

    Values are shared as far as `bind` gives back the inputs' own.
    """
    env = {i.value: bind(i) for i in graph.inputs}
    for node in graph.nodes:
        env.update(zip(node.outputs, b.again(node, tuple([env[v] for v in node.inputs])), strict=True))
    b.origin = ""
    return env


def same_input(b: Builder) -> Callable[[Input], Value]:
    """A `bind` for `copy_into` that keeps role and name."""
    return lambda i: b.same(i.role, i.name, i.value)
