"""Two threads are at least 1.85 times as fast as one, one task included."""

from __future__ import annotations

import argparse

from bench import machine
from bench.claim import Claim, run

WORKLOADS = ("sinusoid-1000", "omniglot", "miniimagenet", "one-omniglot")


def measure(given: argparse.Namespace) -> list[Claim]:
    """Ratio of medians at one and two threads; metafast takes the count from torch at each call."""
    machine.bind(2)
    machine.settle(2)
    import torch

    from bench.harness import QUICK, Effort, medians_in_turns
    from bench.peers import Metafast
    from bench.workloads import WORKLOADS as ROWS
    from bench.workloads import make_case

    claims = []
    for name in ("tiny-mlp",) if given.quick else WORKLOADS:
        call = Metafast().prepare(make_case(ROWS[name]))

        def at(threads: int, call=call) -> object:
            torch.set_num_threads(threads)
            return call()

        one, two = medians_in_turns([lambda: at(1), lambda: at(2)], QUICK if given.quick else Effort())
        claims.append(Claim(f"two threads over one, {name}", one / two, 1.85, "×", at_least=True))
    return claims


if __name__ == "__main__":
    run(__doc__, measure)
