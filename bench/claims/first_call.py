"""The first call of a net takes at most 0.25 s for an MLP and 0.5 s for conv4 (capture to check).

Measured in processes that have imported torch and metafast and nothing else, on a batch of four tasks; then
another shape of the same model, which is to take at most 0.1 s. The numbers include the computation itself; what a
call like the last takes, and eager PyTorch's loss and gradient of one task, which the check needs, are printed beside.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from dataclasses import replace

from bench import machine
from bench.claim import Claim, in_fresh, run

NETS = {"mlp": ("sinusoid", 0.25), "conv4": ("omniglot", 0.5)}
SECOND_SHAPE = 0.1


def child(given: argparse.Namespace) -> dict:
    """Seconds of the first call, of one like it, of one with fewer query rows, and of what that asks of PyTorch."""
    machine.bind(given.threads)
    import torch

    import metafast  # noqa: F401

    machine.settle(given.threads)
    from bench.peers import Metafast
    from bench.workloads import WORKLOADS, make_case

    case = make_case(replace(WORKLOADS[NETS[given.child][0]], tasks=4))
    fewer, fewest = (tuple(tensor[:, :-n].contiguous() for tensor in case.query) for n in (5, 6))
    start = time.perf_counter()
    inner = Metafast().loop(case)
    marks = [start]
    for query in (case.query, case.query, fewer):
        inner.meta_gradient(case.support, query)
        marks.append(time.perf_counter())
    x, y = (tensor[0] for tensor in fewest)
    torch.autograd.grad(case.workload.loss(case.module(x), y), list(case.module.parameters()))
    marks.append(time.perf_counter())
    first, again, other, eager = (after - before for before, after in itertools.pairwise(marks))
    return {"first": first, "again": again, "other shape": other, "PyTorch, one task": eager}


def measure(given: argparse.Namespace) -> list[Claim]:
    """Medians over fresh processes."""
    claims = []
    for net, (_, limit) in NETS.items():
        found = [in_fresh("bench.claims.first_call", net, given) for _ in range(1 if given.quick else 5)]
        median = {key: statistics.median(f[key] for f in found) for key in found[0]}
        print(f"{net}: " + ", ".join(f"{key} {1e3 * seconds:.1f} ms" for key, seconds in median.items()))
        claims.append(Claim(f"first call, {net}", median["first"], limit, "s"))
        claims.append(Claim(f"second shape, {net}", median["other shape"], SECOND_SHAPE, "s"))
    return claims


if __name__ == "__main__":
    run(__doc__, measure, child)
