"""First order (FOMAML) takes at most 60 % of the time of second order at five steps."""

from __future__ import annotations

import argparse

from bench import machine
from bench.claim import Claim, run

WORKLOADS = ("sinusoid", "omniglot-20w5s")


def measure(given: argparse.Namespace) -> list[Claim]:
    """Ratio of medians, the two orders in turns."""
    machine.bind(given.threads)
    machine.settle(given.threads)
    from bench.harness import QUICK, Effort, medians_in_turns
    from bench.peers import Metafast
    from bench.workloads import WORKLOADS as ROWS
    from bench.workloads import first_order, make_case

    claims = []
    for name in ("tiny-mlp",) if given.quick else WORKLOADS:
        orders = (first_order(ROWS[name]), ROWS[name])
        calls = [Metafast().prepare(make_case(row)) for row in orders]
        first, second = medians_in_turns(calls, QUICK if given.quick else Effort())
        claims.append(Claim(f"order 1 over order 2, {name}", 100 * first / second, 60, "%"))
    return claims


if __name__ == "__main__":
    run(__doc__, measure)
