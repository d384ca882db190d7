"""Cut a section into units: what one instruction (or a few that share a buffer) will do.

A *cluster* is a set of pointwise nodes of one shape that run block by block through L1 as one instruction. A node joins
the cluster of one of its producers where no path leaves that cluster and comes back. A *sum* is an addition whose terms
are all kernels that can accumulate (`x·Ẇ + ẋ·W`): the terms write into one buffer. A *biased* unit is a product or
convolution that starts from its bias. A *lazy* node is a cheap function of one value (a mask, a multiple) that only
clusters read: each of them computes it again, which costs less than writing it down. A sum over what a cluster makes is
the cluster's own output.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from metafast.graph import Graph, Node, Value
from metafast.ops import TABLE, numel
from metafast.ops.pointwise import POINTWISE
from metafast.passes import enabled
from metafast.sweep import Section, Store

ACCUMULATING = {  # the layout written
    "matmul": "rows",
    "matmul_lanes": "rows",
    "conv2d": "pixels",
    "conv2d_dx": "pixels",
    "conv2d_dw": "weights",
}
PRODUCTS = {"matmul", "matmul_lanes"}  # kernels that another array can take up
CHEAP = {"step", "neg", "sign", "gt", "ge", "lt", "le", "eq", "ne", "add", "sub", "mul"}
SMALL = 64  # a vector is small beside an array of so many times its elements
LARGE = 1 << 16  # elements of an array that passes over memory are to be spared
MAX_OPS = 40  # registers and inputs of a cluster must fit L1 in blocks of some hundred elements
MAX_INPUTS = 20


@dataclass(frozen=True)
class Onto:
    """What a product is added to (`sign` 1) or taken from (-1), and its factor: one number, or None for 1."""

    base: Value
    factor: Value | None
    sign: int


@dataclass(eq=False)
class Unit:
    """`nodes` in order: one node, or a cluster (`pointwise`), or the terms of a sum (`result` names their total), or
    one node that starts from `bias` (`result` is what the addition would have made), or the terms of a sum that goes
    `onto` a value."""

    kind: str  # "node" | "pointwise" | "sum" | "biased" | "onto"
    nodes: list[Node] = field(default_factory=list)
    stores: list[tuple[Value, Store]] = field(default_factory=list)
    result: Value | None = None
    bias: Value | None = None
    onto: Onto | None = None
    sums: list[Node] = field(default_factory=list)
    order: int = 0
    inputs: set[Value] = field(default_factory=set)

    @property
    def shape(self) -> tuple[int, ...]:
        """What a cluster runs over."""
        return self.nodes[0].outputs[0].shape if self.nodes else self.stores[0][0].shape


def is_large(shape: tuple[int, ...]) -> bool:
    """Whether passes over memory are what an array of that shape costs."""
    return numel(shape) >= LARGE


def is_free(node: Node) -> bool:
    """Views and constants cost no instruction of their own."""
    return TABLE[node.op].kernel in ("view", "constant")


def aliases(graph: Graph, through: Callable[[Node], bool]) -> dict[Value, Value]:
    """What the outputs of such views are views of."""
    found: dict[Value, Value] = {}
    for node in graph.nodes:
        if through(node):
            found[node.outputs[0]] = found.get(node.inputs[0], node.inputs[0])
    return found


def units(section: Section) -> list[Unit]:
    """The section's units in an order that respects every dependence."""
    return _Fuser(section).run()


class _Fuser:
    def __init__(self, section: Section) -> None:
        self.section = section
        self.graph: Graph = section.graph
        self.producer = self.graph.producers()
        self.position = {n: k for k, n in enumerate(self.graph.nodes)}
        self.users: dict[Value, list[Node]] = defaultdict(list)
        self.uses: dict[Value, int] = defaultdict(int)
        for n in self.graph.nodes:
            for v in n.inputs:
                self.users[v].append(n)
                self.uses[v] += 1
        for v in self.graph.outputs.values():
            self.uses[v] += 1
        self.alias = aliases(self.graph, lambda node: node.op == "stop_gradient")
        self.root = aliases(self.graph, lambda node: TABLE[node.op].kernel == "view")
        self.lazy = self._lazy() if enabled("lazy") else set()
        self.given = {i.value for i in self.graph.inputs}
        self.units: list[Unit] = []
        self.summed: dict[Value, int] = {}  # the sums that a cluster makes of its own values
        self.unit_of: dict[Value, int] = {}
        self.before: list[int] = []  # bit set of the units each unit depends on, transitively

    def run(self) -> list[Unit]:
        for k, node in enumerate(self.graph.nodes):
            if is_free(node) or node in self.lazy:
                continue
            if node.op == "add" and enabled("sums") and self._sum(node, k):
                continue
            if node.op == "add" and enabled("bias") and self._bias(node, k):
                continue
            if enabled("onto") and (self._scales_for_onto(node) or self._onto(node, k)):
                continue
            if node.op == "sum" and enabled("reductions") and self._reduction(node):
                continue
            self._pointwise(node, k) if node.op in POINTWISE else self._single(node, k)
        for store in self.section.stores:
            self._store(store)
        return self._ordered()

    # -- dependence

    def _deps(self, values: Iterable[Value]) -> set[int]:
        return {u for v in values if (u := self.unit_of.get(self.root.get(v, v))) is not None}

    # -- lazy nodes

    def _lazy(self) -> set[Node]:
        lazy: set[Node] = set()
        outputs = set(self.graph.outputs.values())
        for node in reversed(self.graph.nodes):
            if node.op in CHEAP and self._of_one_value(node) and node.outputs[0] not in outputs:
                users = self.users[node.outputs[0]]
                shape = node.outputs[0].shape
                deep = any(n in lazy and any(m in lazy for m in self.users[n.outputs[0]]) for n in users)
                alike = all(n.op in POINTWISE and n.outputs[0].shape == shape for n in users)
                if alike and not deep and (is_large(shape) or not any(n in lazy for n in users)):
                    lazy.add(node)
        return lazy

    def _of_one_value(self, node: Node) -> bool:
        """Whether one input has the result's shape and all others are 0-dim constants, or small beside a large one."""
        shape = node.outputs[0].shape
        moving = [v for v in node.inputs if (n := self.producer.get(v)) is None or n.op != "const"]
        if is_large(shape):
            moving = [v for v in moving if SMALL * numel(self.root.get(v, v).shape) > numel(shape)]
        return len(moving) == 1 and moving[0].shape == shape

    def _with_lazy(self, node: Node) -> list[Node]:
        """The node, after the lazy nodes it reads and those that these read."""
        makers = [n for v in node.inputs if (n := self.producer.get(v)) is not None and n in self.lazy]
        return [*(n for maker in makers for n in self._with_lazy(maker)), node]

    def _closure(self, deps: set[int]) -> int:
        bits = 0
        for d in deps:
            bits |= self.before[d] | (1 << d)
        return bits

    def _new(self, unit: Unit, deps: set[int]) -> int:
        self.units.append(unit)
        self.before.append(self._closure(deps))
        return len(self.units) - 1

    def _own(self, u: int, node: Node, k: int) -> None:
        self.units[u].nodes.append(node)
        self.units[u].order = k
        for v in node.outputs:
            self.unit_of[v] = u

    def _single(self, node: Node, k: int) -> None:
        self._own(self._new(Unit("node"), self._deps(node.inputs)), node, k)

    # -- clusters

    def _pointwise(self, node: Node, k: int) -> None:
        group = self._with_lazy(node)
        inputs = tuple(v for n in group for v in n.inputs)
        deps = self._deps(inputs)
        makers = self._makers(inputs, node.outputs[0].shape) if enabled("clusters") else set()
        u = self._home(makers, inputs, deps)
        if u is None:
            u = self._new(Unit("pointwise"), deps)
        else:
            for w in makers - {u}:
                self._merge(u, w, deps)
            self._join(u, self._deps(inputs))
        unit = self.units[u]
        unit.inputs.update(inputs)
        unit.nodes += [n for n in dict.fromkeys(group[:-1]) if n not in unit.nodes]
        self._own(u, node, k)

    def _home(self, makers: set[int], inputs: tuple[Value, ...], deps: set[int]) -> int | None:
        """The latest of those clusters that may take one more node with these inputs."""
        for u in sorted(makers, reverse=True):
            unit = self.units[u]
            if len(unit.nodes) >= MAX_OPS or len(unit.inputs | set(inputs)) >= MAX_INPUTS:
                continue
            if not any(self.before[d] >> u & 1 for d in deps if d != u):
                return u
        return None

    def _makers(self, inputs: tuple[Value, ...], shape: tuple[int, ...]) -> set[int]:
        """The clusters of that shape that make one of the inputs and that a reader of all of them could be part of."""
        seen = [(self.alias.get(v, v), self.root.get(v, v)) for v in inputs]
        makers = {self.unit_of[v] for v, _ in seen if v in self.unit_of}
        makers -= {self.summed[r] for _, r in seen if r in self.summed}
        # A view reads elements that other blocks of the maker write: its reader runs after that cluster, not in it.
        makers -= {self.unit_of[r] for v, r in seen if r is not v and r in self.unit_of}
        return {u for u in makers if self.units[u].kind == "pointwise" and self.units[u].shape == shape}

    def _merge(self, u: int, w: int, deps: set[int]) -> None:
        """Make cluster `w` part of `u`, where neither waits for the other nor anything in between for `w`."""
        one, other = self.units[u], self.units[w]
        apart = not (self.before[u] >> w & 1 or self.before[w] >> u & 1)
        fits = len(one.nodes) + len(other.nodes) < MAX_OPS and len(one.inputs | other.inputs) < MAX_INPUTS
        if not (apart and fits) or any(self.before[d] >> w & 1 for d in deps - {u, w}):
            return
        nodes = dict.fromkeys((*one.nodes, *other.nodes))
        one.nodes = sorted(nodes, key=self.position.__getitem__)
        one.inputs |= other.inputs
        one.sums += other.sums
        for table in (self.unit_of, self.summed):
            table.update({v: u for v, unit in table.items() if unit == w})
        self.units[w] = Unit("gone")
        self.before[u] |= self.before[w]
        for x in range(len(self.units)):
            if self.before[x] >> u & 1 or self.before[x] >> w & 1:
                self.before[x] |= self.before[u] | 1 << u

    def _join(self, u: int, deps: set[int]) -> None:
        more = self._closure({d for d in deps if d != u}) & ~self.before[u]
        if more:
            self.before[u] |= more
            for w in range(len(self.units)):
                if self.before[w] >> u & 1:
                    self.before[w] |= self.before[u]

    # -- sums

    def _sum(self, node: Node, k: int) -> bool:
        """Make `add(p, q)` a sum unit where both are accumulating kernels (or sums of them) that nothing else reads."""
        terms: list[Node] = []
        olds: list[int] = []
        for v in node.inputs:
            u = self.unit_of.get(v)
            if u is None or self.uses[v] != 1 or v.shape != node.outputs[0].shape:
                return False
            unit = self.units[u]
            ok = unit.kind == "sum" or (unit.kind == "node" and unit.nodes[0].op in ACCUMULATING)
            if not ok or u in olds:
                return False
            terms += unit.nodes
            olds.append(u)
        if len({ACCUMULATING[n.op] for n in terms}) > 1:
            return False  # one buffer has one layout
        deps = {d for n in terms for d in self._deps(n.inputs)}
        if any(self._closure(deps) >> u & 1 for u in olds):
            return False
        new = self._new(Unit("sum", terms, result=node.outputs[0], order=k), deps)
        for u in olds:
            self.units[u] = Unit("gone")
        self.unit_of[node.outputs[0]] = new
        return True

    # -- reductions of what a cluster makes

    def _reduction(self, node: Node) -> bool:
        """Let the cluster that makes the values add them up while they are in L1; no later node may join through it."""
        u = self.unit_of.get(self.alias.get(node.inputs[0], node.inputs[0]))
        if u is None or self.units[u].kind != "pointwise" or node.inputs[0].shape != self.units[u].shape:
            return False
        if len(self.units[u].sums) + len(self.units[u].inputs) >= MAX_INPUTS or node.inputs[0] in self.summed:
            return False
        self.units[u].sums.append(node)
        self.unit_of[node.outputs[0]] = self.summed[node.outputs[0]] = u
        return True

    # -- biases

    def _bias(self, node: Node, k: int) -> bool:
        """Make `add(product, bias)` a biased unit where a kernel reads it; clusters alone add a bias for nothing."""
        out = node.outputs[0]
        if self.users[out] and all(n.op in POINTWISE for n in self.users[out]):
            return False
        for v, bias in (node.inputs, node.inputs[::-1]):
            u = self.unit_of.get(v)
            if u is None or self.uses[v] != 1 or self.units[u].kind != "node" or v.shape != out.shape:
                continue
            maker = self.units[u].nodes[0]
            channel = {"conv2d": -3, "matmul": -1}.get(maker.op)
            if channel is None or not _lies_along(bias.shape, out.shape, channel):
                continue
            deps = self._deps((*maker.inputs, bias))
            if self._closure(deps) >> u & 1:
                continue
            new = self._new(Unit("biased", [maker], result=out, bias=bias, order=k), deps)
            self.units[u] = Unit("gone")
            self.unit_of[out] = new
            return True
        return False

    # -- products that another array takes up

    def _scales_for_onto(self, node: Node) -> bool:
        """Whether the node is the factor's part of what `_onto` makes of its reader."""
        readers = self.users[node.outputs[0]]
        return node.op == "mul" and len(readers) == 1 and self._taken_up(readers[0]) is not None

    def _onto(self, node: Node, k: int) -> bool:
        found = self._taken_up(node)
        if found is None:
            return False
        product, onto = found
        old = self.unit_of[product]
        terms, out = self.units[old].nodes, node.outputs[0]
        read = [v for n in terms for v in n.inputs]
        deps = self._deps((*read, onto.base, *([] if onto.factor is None else [onto.factor])))
        new = self._new(Unit("onto", terms, result=out, onto=onto, order=k), deps)
        self.units[old] = Unit("gone")
        self.unit_of[out] = new
        return True

    def _taken_up(self, node: Node) -> tuple[Value, Onto] | None:
        """The product and what takes it up, of `base ± product` or `base ± factor · product`, where a cluster would do
        nothing else: it does not make the base and no other pointwise node reads the result."""
        out = node.outputs[0]
        if node.op not in ("add", "sub") or any(n.op in POINTWISE for n in self.users[out]):
            return None
        for base, v in (node.inputs, node.inputs[::-1])[: 1 + (node.op == "add")]:
            product, factor = self._scaled(v)
            if base.shape == out.shape == product.shape and self._is_product(product) and self._lies_ready(base):
                return product, Onto(base, factor, 1 if node.op == "add" else -1)
        return None

    def _scaled(self, v: Value) -> tuple[Value, Value | None]:
        """What a number multiplies, where nothing else reads the result, and the number."""
        node = self.producer.get(v)
        if node is None or node.op != "mul" or self.uses[v] != 1 or v in self.unit_of:
            return v, None
        for factor, of in (node.inputs, node.inputs[::-1]):
            if numel(factor.shape) == 1 and self._is_product(of) and self.producer.get(factor) not in self.lazy:
                return of, factor
        return v, None

    def _is_product(self, v: Value) -> bool:
        u = self.unit_of.get(v)
        if u is None or self.uses[v] != 1 or self.units[u].kind not in ("node", "sum"):
            return False
        return all(n.op in PRODUCTS for n in self.units[u].nodes)

    def _lies_ready(self, v: Value) -> bool:
        """Whether the value is given, or made by something other than a cluster."""
        root = self.root.get(v, v)
        return root in self.given or (root in self.unit_of and self.units[self.unit_of[root]].kind != "pointwise")

    # -- stores

    def _store(self, store: Store) -> None:
        value = self.graph.outputs[store.output]
        made = self.alias.get(value, value)
        u = self.unit_of.get(made)
        joins = u is not None and self.units[u].kind == "pointwise" and self.units[u].shape == value.shape
        if u is None or not joins or made in self.summed or not enabled("direct"):
            u = self._new(Unit("pointwise", order=len(self.graph.nodes)), self._deps((value,)))
        self.units[u].stores.append((value, store))

    # -- order

    def _ordered(self) -> list[Unit]:
        """Units, each after those it reads; of those ready, the one whose last node is earliest: short lives."""
        alive = [u for u in range(len(self.units)) if self.units[u].kind != "gone"]
        gone = sum(1 << u for u in range(len(self.units)) if self.units[u].kind == "gone")
        done, out = gone, []
        pending = sorted(alive, key=lambda u: self.units[u].order)
        while pending:
            ready = next(u for u in pending if not self.before[u] & ~done)
            pending.remove(ready)
            done |= 1 << ready
            out.append(self.units[ready])
        return out


def _lies_along(shape: tuple[int, ...], full: tuple[int, ...], dim: int) -> bool:
    """Whether an array of that shape, broadcast to `full`, varies along `dim` (from the end) and nowhere else."""
    along = {dim: full[dim]}
    return len(shape) >= -dim and all(n == along.get(d - len(shape), 1) for d, n in enumerate(shape))
