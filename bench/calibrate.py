"""`python -m bench.calibrate`: what `metafast.cost` guesses, measured: nets by themselves and in blocks of tasks.

Times the meta-gradient of many small nets both ways on one thread, fits the two rows of `metafast.cost` to the times
(non-negative least squares of relative errors, outliers weighed down) and prints them, how far off the fitted and the
present rows are, and what choosing by each costs beyond the better way; all of the instruction set in use
(`METAFAST_ISA=avx2` takes another).
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import nn

import metafast
from bench import machine, options
from bench.harness import pace
from metafast import _C, cost
from metafast.native import captured, make_plan
from metafast.ops import numel

CALL = 5e-6  # seconds of a call that are neither task's nor block's
SAMPLE = 6e-3  # seconds
TYPICAL = 0.3  # relative error from which on a time weighs less: a disturbed one


@dataclass(frozen=True)
class Net:
    """A net and its loop: widths, rows of support and query, steps, order, activation, layer norms, dtype."""

    widths: tuple[int, ...]
    rows: int
    steps: int
    order: int = 2
    activation: str = "ReLU"
    norm: bool = False
    dtype: str = "float32"

    def loop(self) -> metafast.InnerLoop:
        """Plain gradient descent on squared errors."""
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for n_in, n_out in zip(self.widths, self.widths[1:], strict=False):
            layers += [nn.Linear(n_in, n_out), *([nn.LayerNorm(n_out)] if self.norm else [])]
            layers += [getattr(nn, self.activation)()]
        model = nn.Sequential(*layers[: -2 if self.norm else -1]).to(getattr(torch, self.dtype))
        return metafast.InnerLoop(model, F.mse_loss, update=metafast.SGD(lr=0.01), steps=self.steps, order=self.order)

    def batch(self, tasks: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of random numbers."""
        ends = self.widths[0], self.widths[-1]
        x, y = (torch.randn(tasks, self.rows, n, dtype=getattr(torch, self.dtype)) for n in ends)
        return x, y


@dataclass(frozen=True)
class Sample:
    """A net, what it does, and microseconds a task by itself and in a block of so many lanes."""

    net: Net
    work: cost.Work
    lanes: int
    alone: float
    block: float


WIDTHS = [(4, 20, 3), (1, 40, 40, 1), (10, 100, 1), (1, 32, 32, 1), (2, 64, 2), (1, 64, 64, 1), (1, 80, 80, 1)]
WIDTHS += [(1, 100, 100, 1), (10, 32, 32, 32, 2), (20, 120, 90, 10), (8, 16, 4), (32, 5), (16, 48, 48, 5)]
WIDTHS += [(64, 32, 5), (3, 24, 24, 24, 24, 1), (100, 30, 1)]


def nets() -> Iterator[Net]:
    """The grid."""
    for widths in WIDTHS:
        for rows in (3, 10, 25, 75):
            yield from (Net(widths, rows, steps, order) for order in (2, 1) for steps in (1, 3, 10))
    for widths in (*WIDTHS[:6], *WIDTHS[12:14]):
        for rows in (5, 20):
            for steps in (1, 5):
                yield from (Net(widths, rows, steps, 2, act) for act in ("Tanh", "GELU"))
                yield from (Net(widths, rows, steps, 2, act, True) for act in ("ReLU", "Tanh"))
                yield Net(widths, rows, steps, dtype="float64")


def measure(net: Net) -> Sample:
    """Two blocks' worth of tasks, in blocks and one by one, in turn."""
    lanes = int(_C.vector_bytes()) // (8 if net.dtype == "float64" else 4)
    batch = net.batch(2 * lanes)
    calls = []
    for at_once in (1, lanes):
        inner = net.loop()
        with mock.patch("metafast.native.divided", lambda *_, n=at_once: ((n, 2 * lanes),)):
            inner.meta_gradient(batch, batch)
        calls.append(lambda inner=inner: inner.meta_gradient(batch, batch))
    alone, block = (1e6 * (t - CALL) / (2 * lanes) for t in _least(calls))
    return Sample(net, work(net), lanes, alone, block)


def _least(calls: Sequence[Callable[[], object]], rounds: int = 5) -> list[float]:
    found = [float("inf")] * len(calls)
    for call in calls:
        call()
    for _ in range(rounds):
        for k, call in enumerate(calls):
            found[k] = min(found[k], pace(call, SAMPLE))
    return found


def work(net: Net) -> cost.Work:
    """What a task of that loop does, as `metafast.cost` counts it."""
    batch = net.batch(1)
    problem = net.loop()._problem(batch, batch, gradient=True)[0]
    plan = make_plan(problem, captured(problem))
    return cost.work(plan.sections("fused", net.steps), net.steps, sum(map(numel, plan.steps.state.values())))


# ---- the fit ------------------------------------------------------------------------------------------


def fit(counts: np.ndarray, nanoseconds: np.ndarray) -> np.ndarray:
    """What one of each takes, so that relative errors are small."""
    from scipy.optimize import nnls

    weights = np.ones(len(counts))
    for _ in range(4):
        found, _ = nnls(counts / nanoseconds[:, None] * weights[:, None], weights)
        off = np.abs(counts @ found / nanoseconds - 1)
        weights = np.minimum(1, TYPICAL / np.maximum(off, 1e-9))
    return found


def counted(samples: Sequence[Sample], alone: bool) -> np.ndarray:
    """What each does, elements in vectors where a task is by itself."""
    rows = [cost.in_vectors(s.work, s.lanes) if alone else s.work for s in samples]
    return np.array(rows)


def report(samples: Sequence[Sample], alone: np.ndarray, block: np.ndarray) -> str:
    """How far off guesses by these rows are, and what the choice by them costs."""
    lanes = np.array([s.lanes for s in samples])
    took = np.array([(s.alone, s.block) for s in samples]) * 1e3
    guessed = np.stack([counted(samples, True) @ alone, counted(samples, False) @ block / lanes], 1)
    off = np.median(np.abs(guessed / took - 1), 0)
    lost = took[range(len(took)), guessed.argmin(1)] / took.min(1) - 1
    return (
        f"median error by itself {off[0]:.0%}, in blocks {off[1]:.0%}; beyond the better way {lost.mean():.1%} "
        f"on average, {np.quantile(lost, 0.95):.0%} in 5 of 100, {lost.max():.0%} at most"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, fit, print."""
    parser = argparse.ArgumentParser(prog="python -m bench.calibrate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=options.writable, metavar="FILE", help="write what was measured there")
    parser.add_argument("--quick", action="store_true", help="few nets: does the script still run?")
    given = parser.parse_args(arguments)
    machine.settle(1)
    grid = list(nets())
    random.Random(0).shuffle(grid)  # so that a disturbed minute meets all kinds
    samples = [measure(net) for net in track(grid[: 16 if given.quick else None], "nets")]
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps([asdict(s) for s in samples], indent=1) + "\n")
    took = np.array([(s.alone, s.lanes * s.block) for s in samples]) * 1e3
    fitted = [fit(counted(samples, alone), took[:, k]) for k, alone in enumerate((True, False))]
    for name, row in zip(("by itself", "in blocks"), fitted, strict=True):
        print(f"{name}: Work({', '.join(f'{v:.2g}' for v in row)})")
    print(f"fitted: {report(samples, *fitted)}")
    print(f"present: {report(samples, *map(np.array, cost.rates(_C.vector_bytes())))}")


if __name__ == "__main__":
    main()
