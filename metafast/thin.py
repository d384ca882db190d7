"""Matrices that are sums of thin products are not made: what is multiplied by them is multiplied by their factors.

The gradient of a linear layer is δᵀx, of rank no more than the batch has rows. So the weights after a few steps of
plain descent are W − η·Σ δᵀx, and

    y·(W − η·δᵀx)ᵀ = y·Wᵀ − η·(y·xᵀ)·δ

takes the product with W, which all tasks share, and two with a thin matrix. Where a layer is wide that is less work
than to make W − η·δᵀx, and far less memory. The same holds of the query's gradient, along which second derivatives are
taken.

A guess of the time decides, matrix by matrix, with the two constants below (bench/LEDGER.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from metafast.graph import Builder, Graph, Node, Shape, Value, same_input
from metafast.ops import numel
from metafast.passes import enabled
from metafast.sweep import Section

__all__ = ["may_pay", "thin"]

# Of what else takes time, how many floating-point operations could be done meanwhile:
_ELEMENT = 16.0  # to write an element of a large matrix, and to read it again
_TERM = 60_000.0  # to start the instructions of one more term

_MOST_TERMS = 64  # of one matrix
_TURNED = (1, 0)


@dataclass(frozen=True)
class _Term:
    """`left`, or left · right where there is one, or its transpose if `turned`, times all `scales`, and maybe −1."""

    left: Value
    right: Value | None = None
    turned: bool = False
    scales: tuple[Value, ...] = ()
    negative: bool = False

    @property
    def rank(self) -> int:
        """Of a product: how many columns its left factor has."""
        return self.left.shape[1] if self.right is not None else 0


_Terms = tuple[_Term, ...]


def thin(section: Section) -> Section | None:
    """The section with such matrices left unmade; None where no sum is among them: products alone are not worth it."""
    if not enabled("thin"):
        return None
    known = _Unmade(section.graph)
    if not any(map(known.sums, known.found)):
        return None
    gradients = {store.output for store in section.stores if store.kind == "gradient"}
    return Section(_Writer(section.graph, known, gradients).run(), section.stores)


def may_pay(sections: Iterable[Section]) -> bool:
    """Whether `thin` can find anything in what is unrolled of those sections: unrolling takes far longer than to ask.

    It finds no sum unless products read one that pays: some matrix and p ≥ 1 products of its shape. Unrolling writes no
    product that no section has, so that what such a sum saves is bounded by the shapes of those there are.
    """
    if not enabled("thin"):
        return False
    ranks: dict[Shape, list[int]] = {}  # of what is made, and by how many rows is read, by shape either way round
    rows: dict[Shape, list[int]] = {}
    for node in (node for section in sections for node in section.graph.nodes if node.op == "matmul"):
        ranks.setdefault(_either(node.outputs[0]), []).append(node.inputs[0].shape[-1])
        for v in node.inputs:
            rows.setdefault(_either(v), []).extend(_rows(node, v))
    return any(_sum_may_pay(shape, ranks[shape], min(rows[shape])) for shape in ranks.keys() & rows.keys())


def _either(v: Value) -> Shape:
    return tuple(sorted(v.shape))


def _sum_may_pay(shape: Shape, ranks: list[int], rows: int) -> bool:
    """Whether a matrix plus p products of those ranks, some number of times each, can save anything where so many rows
    at least are multiplied by it: with R the sum of the ranks, at most area·(_ELEMENT + 2R), all of its making, and it
    takes 2·rows·R·edges and p + 1 terms. In p that is a straight line: if it does not rise, one product is best."""
    if len(shape) != 2:
        return False
    area, edges = numel(shape), sum(shape)
    each = max(2.0 * rank * (area - rows * edges) - _TERM for rank in ranks)
    return each > 0 or area * _ELEMENT - _TERM + each > 0


# ---- which matrices ---------------------------------------------------------------------------------------------


class _Unmade:
    """The matrices that need not be made, each with its terms."""

    def __init__(self, graph: Graph) -> None:
        self._outputs = set(graph.outputs.values())
        self._readers: dict[Value, list[Node]] = {}
        self._terms: dict[Value, _Terms] = {}
        for node in graph.nodes:
            for v in dict.fromkeys(node.inputs):
                self._readers.setdefault(v, []).append(node)
            if terms := self._terms_of(node):
                self._terms[node.outputs[0]] = terms
        self.found: dict[Value, _Terms] = {}
        for value in reversed(self._terms):  # those made of it come first
            if self._pays(value):
                self.found[value] = self._terms[value]

    def _terms_of(self, node: Node) -> _Terms:
        """What a matrix is a sum of, where products are among it; else nothing."""
        if len(node.outputs[0].shape) != 2 or node.outputs[0].dtype != "real" or node.op not in _TERMS:
            return ()
        terms = _TERMS[node.op](self, node)
        return terms if any(t.right is not None for t in terms) and len(terms) <= _MOST_TERMS else ()

    def of(self, value: Value) -> _Terms:
        return self._terms.get(value) or (_Term(value),)

    def sums(self, value: Value) -> bool:
        """Whether it is a sum of several terms, products among them."""
        return len(self.of(value)) > 1

    def _pays(self, value: Value) -> bool:
        """Whether all that read a matrix can do with its terms, in less time."""
        readers = self._readers.get(value, [])
        products = [node for node in readers if node.op == "matmul"]
        sums = [node for node in readers if node.op != "matmul"]
        if any(node.outputs[0] not in self._terms for node in sums):
            return False
        if not products:  # it is made where one of those is that it becomes part of
            return bool(sums) and value not in self._outputs and all(n.outputs[0] in self.found for n in sums)
        area, edges = value.shape[0] * value.shape[1], value.shape[0] + value.shape[1]
        rank, count = sum(t.rank for t in self.of(value)), len(self.of(value))
        whole = sum(t.right is None for t in self.of(value))
        rows = [r for node in products for r in _rows(node, value)]
        made = sum(2.0 * r * area for r in rows) + self._making(value, sums, area, rank)
        unmade = sum(2.0 * r * (whole * area + rank * edges) + count * _TERM for r in rows)
        return unmade < made

    def _making(self, value: Value, sums: list[Node], area: int, rank: int) -> float:
        """What is saved where the matrix is not made. A gradient adds its products up where it lies, in any case."""
        if all(node.outputs[0] in self.found for node in sums) and value not in self._outputs:
            return area * (_ELEMENT + 2.0 * rank)
        gradients = all(node.outputs[0] in self.found or node.outputs[0] in self._outputs for node in sums)
        return area * _ELEMENT if gradients else 0.0


def _rows(node: Node, value: Value) -> Iterator[int]:
    """How many rows, or columns, a product multiplies a matrix by."""
    left, right = node.inputs
    if right is value:
        yield left.shape[-2]
    if left is value:
        yield right.shape[-1]


# ---- their terms, op by op --------------------------------------------------------------------------------------


def _of_product(known: _Unmade, node: Node) -> _Terms:
    left, right = node.inputs
    return (_Term(left, right),)


def _of_sum(known: _Unmade, node: Node) -> _Terms:
    left, right = node.inputs
    if left.shape != right.shape:
        return ()
    return known.of(left) + (known.of(right) if node.op == "add" else _negated(known.of(right)))


def _of_multiple(known: _Unmade, node: Node) -> _Terms:
    scales, rest = [v for v in node.inputs if not v.shape], [v for v in node.inputs if v.shape]
    if len(scales) != 1:
        return ()
    return tuple(replace(t, scales=(*t.scales, *scales)) for t in known.of(rest[0]))


def _of_negative(known: _Unmade, node: Node) -> _Terms:
    return _negated(known.of(node.inputs[0]))


def _of_transpose(known: _Unmade, node: Node) -> _Terms:
    return tuple(replace(t, turned=not t.turned) for t in known.of(node.inputs[0]))


def _negated(terms: _Terms) -> _Terms:
    return tuple(replace(t, negative=not t.negative) for t in terms)


_TERMS: dict[str, Callable[[_Unmade, Node], _Terms]] = {
    "matmul": _of_product,
    "add": _of_sum,
    "sub": _of_sum,
    "mul": _of_multiple,
    "neg": _of_negative,
    "permute": _of_transpose,
}


# ---- the products that read them --------------------------------------------------------------------------------


@dataclass
class _Writer:
    graph: Graph
    known: _Unmade
    gradients: set[str]  # outputs that are added up, whose products need not be added before
    b: Builder = field(default_factory=Builder)
    env: dict[Value, Value] = field(default_factory=dict)

    def run(self) -> Graph:
        bind = same_input(self.b)
        self.env = {i.value: bind(i) for i in self.graph.inputs}
        for node in self.graph.nodes:
            if node.op == "matmul" and not self.known.found.keys().isdisjoint(node.inputs):
                self.b.origin = node.origin
                made: tuple[Value, ...] = (self._product(*node.inputs),)
            else:
                made = self.b.again(node, tuple([self.env[v] for v in node.inputs]))
            self.env.update(zip(node.outputs, made, strict=True))
        outputs = {name: self._output(name, v) for name, v in self.graph.outputs.items()}
        self.b.origin = ""
        return self.b.finish(outputs, keep_inputs=True)

    def _output(self, name: str, value: Value) -> Value:
        """A gradient is a plain sum of products, each of which can be added where it belongs."""
        if name not in self.gradients or not self.known.sums(value):
            return self.env[value]
        return self._added(self.known.of(value), self._chain)

    def _product(self, left: Value, right: Value) -> Value:
        """left · right, of which at least one is not made."""
        if right in self.known.found:
            return self._added(self.known.of(right), lambda factors: self._chain([self.env[left], *factors]))
        return self._added(self.known.of(left), lambda factors: self._chain([self.env[right], *factors[::-1]], "left"))

    def _chain(self, factors: list[Value], side: str = "right") -> Value:
        """The first factor times the others, one after the other, on that side."""
        total, *others = factors
        for v in others:
            total = self.b.op("matmul", total, v) if side == "right" else self.b.op("matmul", v, total)
        return total

    def _added(self, terms: _Terms, times: Callable[[list[Value]], Value]) -> Value:
        """The sum over the terms of what `times` makes of a term's factors; those of one factor first."""
        total: Value | None = None
        for term in sorted(terms, key=lambda t: (t.right is not None, t.negative)):
            made = times(self._factors(term))
            if total is None:
                total = self.b.op("neg", made) if term.negative else made
            else:
                total = self.b.op("sub" if term.negative else "add", total, made)
        assert total is not None
        return total

    def _factors(self, term: _Term) -> list[Value]:
        """Left to right, the scales in the smaller of two."""
        factors = [self.env[v] for v in (term.left, term.right) if v is not None]
        if term.turned:
            factors = [self.b.op("permute", v, dims=_TURNED) for v in reversed(factors)]
        smaller = min(range(len(factors)), key=lambda n: numel(factors[n].shape))
        for scale in term.scales:
            factors[smaller] = self.b.op("mul", self.env[scale], factors[smaller])
        return factors
