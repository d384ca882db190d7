"""A call with next to no work takes at most 60 µs to raw gradients and 200 µs with `.backward()`."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

from bench import machine
from bench.claim import Claim, run


def _median_microseconds(call: Callable[[], object], rounds: int) -> float:
    for _ in range(20):
        call()
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        found.append(1e6 * (time.perf_counter() - start))
    return statistics.median(found)


def measure(given: argparse.Namespace) -> list[Claim]:
    """Median of single calls of a net with two parameters on one task of one row."""
    machine.bind(given.threads)
    machine.settle(given.threads)
    from bench.architectures import mlp
    from bench.peers import Metafast
    from bench.workloads import Workload, make_case

    case = make_case(Workload("least", "linear 1-1", mlp(1, 1), (1,), 0, 1, 1, 1, 1, 0.01))
    inner = Metafast().loop(case)

    def backward() -> None:
        case.module.zero_grad(set_to_none=True)
        inner(case.support, case.query).backward()

    rounds = 50 if given.quick else 2000
    raw = _median_microseconds(lambda: inner.meta_gradient(case.support, case.query), rounds)
    return [
        Claim("call overhead to raw gradients", raw, 60, "µs"),
        Claim("call overhead with .backward()", _median_microseconds(backward, rounds), 200, "µs"),
    ]


if __name__ == "__main__":
    run(__doc__, measure)
