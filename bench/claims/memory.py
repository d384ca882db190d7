"""Peak memory of the fused call does not grow with tasks, with steps by checkpoints alone, within a budget if given.

Each point is the least of four fresh processes (some are 35 MiB above the others): resident bytes with the data in
place, then the most that two calls reach above them. From 8 to 256 tasks (conv4-64 on Omniglot shapes) the peak may
grow by 5 %; from 1 to 16 steps by one copy of the parameters a step and worker, and 5 %; with a budget of 16 copies a
worker, the fewest that 64 steps need, from 1 to 64 steps up to that budget, and 5 %.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from bench import machine
from bench.claim import Claim, in_fresh, run

TASKS, STEPS = (8, 32, 256), (1, 4, 16)
BUDGET, WITHIN = 16, (1, 16, 64)  # copies of the parameters; steps


def child(given: argparse.Namespace) -> dict:
    """Peak bytes above the data for `tasks,steps,copies`, and the bytes of one copy of the parameters."""
    machine.bind(given.threads)
    machine.settle(given.threads)
    from bench.peers import Metafast
    from bench.trial import measure_calls
    from bench.workloads import WORKLOADS, make_case

    tasks, steps, copies = map(int, given.child.split(","))
    workload = WORKLOADS["tiny-conv" if given.quick else "omniglot"]
    case = make_case(replace(workload, tasks=tasks, steps=steps))
    line = 64  # bytes: each parameter begins on a cache line
    parameters = sum(-(-p.numel() * p.element_size() // line) * line for p in case.params.values())
    budget = copies * given.threads * parameters or None
    return measure_calls(lambda: Metafast(memory_budget=budget).prepare(case)) | {"parameters": parameters}


def _peak(tasks: int, steps: int, given: argparse.Namespace, copies: int = 0) -> dict:
    times = 1 if given.quick else 4
    runs = [in_fresh("bench.claims.memory", f"{tasks},{steps},{copies}", given) for _ in range(times)]
    found = min(runs, key=lambda one: one["peak"])
    budget = f" within a budget of {copies} copies a worker" if copies else ""
    took = f"peak {found['peak'] / 2**20:.1f} MiB above the data, {found['second']:.2f} s"
    print(f"{tasks:4} tasks, {steps:2} steps{budget}: {took}")
    return found


def _growth(first: dict, last: dict, copies: int, given: argparse.Namespace) -> float:
    """By how many percent the last peak is above the first and so many copies of the parameters a worker."""
    held = copies * given.threads * first["parameters"]
    return 100 * ((last["peak"] - held) / first["peak"] - 1)


def measure(given: argparse.Namespace) -> list[Claim]:
    """Growth over tasks at one step, and over steps at 8 tasks beyond the checkpoints or the budget."""
    all_tasks, all_steps, within = ((2, 8), (1, 2), (1, 64)) if given.quick else (TASKS, STEPS, WITHIN)
    by_tasks = [_peak(tasks, 1, given) for tasks in all_tasks]
    by_steps = [_peak(all_tasks[0], steps, given) for steps in all_steps]
    budgeted = [_peak(all_tasks[0], steps, given, BUDGET) for steps in within]
    tasks, steps, more = (f"{found[0]} to {found[-1]}" for found in (all_tasks, all_steps, within))
    over_tasks = _growth(by_tasks[0], by_tasks[-1], 0, given)
    over_steps = _growth(by_steps[0], by_steps[-1], all_steps[-1] - all_steps[0], given)
    budget = _growth(budgeted[0], budgeted[-1], BUDGET - 2, given)  # one step has two states
    return [
        Claim(f"growth of the peak, {tasks} tasks", over_tasks, 5, "%"),
        Claim(f"growth beyond checkpoints, {steps} steps", over_steps, 5, "%"),
        Claim(f"growth beyond a budget, {more} steps", budget, 5, "%"),
    ]


if __name__ == "__main__":
    run(__doc__, measure, child)
