"""What a task costs by itself, and what a block of tasks side by side does: guessed from graphs, before lowering.

Both are sums of what the sections do, counted once, times what one of each takes (a linear model; `python -m
bench.calibrate` measures nets of many sizes both ways, fits the rows below and prints how far off they are).
A task by itself pays for every instruction and fills its vectors with elements of one array; a block pays for
instructions once, however many lanes there are, and every element is a vector. So a block wins where arrays are small,
by up to six times, and loses where products fill vectors by themselves and parameters of many tasks leave the caches.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import NamedTuple

from metafast.graph import Node
from metafast.ops import TABLE, numel
from metafast.sweep import Section

__all__ = ["Work", "in_vectors", "lane", "rates", "work"]


class Work(NamedTuple):
    """How much there is of what takes time; with nanoseconds in its place, how long one of each takes."""

    runs: float = 0.0
    products: float = 0.0
    passes: float = 0.0  # nodes that are done element by element: what fusing makes of them is not known yet
    sums: float = 0.0
    flops: float = 0.0  # from here on in elements: those of products
    operands: float = 0.0  # of products, with results
    summed: float = 0.0
    many: float = 0.0  # elements of operations that take many instructions
    normalised: float = 0.0
    state: float = 0.0  # what steps hand on


CALLS = 4  # so many of the above are not elements

# Of a task by itself and of a block, by bytes of a vector (Zen 5, one thread). The least stands for what is narrower.
RATES = {
    64: (
        Work(410, 7.3, 13, 27, 0.051, 0.31, 4.5, 8.8, 4.0, 0.53),
        Work(3240, 0, 0.7, 0, 0.083, 0.29, 0.76, 9.6, 3.5, 0.11),
    ),
    32: (
        Work(730, 2.6, 15, 79, 0.051, 0.24, 2.5, 7.5, 1.7, 0.44),
        Work(2990, 0, 11, 0, 0.064, 0.17, 0.79, 7.6, 2.5, 0.19),
    ),
}

_MANY = {"exp", "log", "pow", "tanh", "sigmoid", "erf", "softplus", "expm1", "log1p", "sin", "cos", "atan"}
_NORMALISED = {"standardize", "project", "project_tangent", "log_softmax"}


def work(sections: Mapping[str, Section], steps: int, state: int) -> Work:
    """What a task does of so many steps, whose state has so many elements."""
    total = Work(runs=1, state=state * (steps + 1) * (2 if "meta" in sections else 1))
    for name, section in sections.items():
        times = steps if name in ("inner", "meta") else 1
        for node in section.graph.nodes:
            total = Work(*[a + times * b for a, b in zip(total, _of(node), strict=True)])
    return total


def lane(done: Work, lanes: int, vector_bytes: int) -> float:
    """The time of a task in a block of so many, as a vector has elements, of that of a task by itself."""
    alone, block = rates(vector_bytes)
    return _time(done, block) / lanes / _time(in_vectors(done, lanes), alone)


def rates(vector_bytes: int) -> tuple[Work, Work]:
    """Nanoseconds that one of each takes, by itself and in a block."""
    return RATES[max(vector_bytes, min(RATES))]


def in_vectors(done: Work, lanes: int) -> Work:
    """Elements counted in vectors of so many."""
    return Work(*done[:CALLS], *[n / lanes for n in done[CALLS:]])


def _time(done: Work, each: Work) -> float:
    return sum(map(operator.mul, done, each))


def _of(node: Node) -> Work:
    kernel, elements = TABLE[node.op].kernel, numel(node.inputs[0].shape) if node.inputs else 0
    if kernel == "matmul":
        operands = sum(numel(v.shape) for v in (*node.inputs, *node.outputs))
        return Work(products=1, flops=TABLE[node.op].flops(node), operands=operands)
    if kernel in _NORMALISED:
        return Work(normalised=elements)
    if kernel in ("reduce", "cumsum") and elements > 1:
        return Work(sums=1, summed=elements)
    made = numel(node.outputs[0].shape)
    if kernel == "pointwise" and made > 1:
        return Work(passes=1, many=made if node.op in _MANY else 0)
    return Work()
