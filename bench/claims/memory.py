"""Peak memory of the fused call does not grow with tasks, and with steps only by checkpoints of parameters.

Each point is a fresh process: resident bytes with the data in place, then the most that two calls reach
above them. From 8 to 256 tasks (conv4-64 on Omniglot shapes) the peak may grow by 5 %; from 1 to 16 steps
by one copy of the parameters a step and worker, and 5 %.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

from bench import machine
from bench.claim import Claim, in_fresh, run

TASKS, STEPS = (8, 32, 256), (1, 4, 16)


def child(given: argparse.Namespace) -> dict:
    """Peak bytes above the data for `tasks,steps`, and the bytes of one copy of the parameters."""
    machine.bind(given.threads)
    machine.settle(given.threads)
    from bench.peers import Metafast
    from bench.trial import measure_calls
    from bench.workloads import WORKLOADS, make_case

    tasks, steps = map(int, given.child.split(","))
    workload = WORKLOADS["tiny-conv" if given.quick else "omniglot"]
    case = make_case(replace(workload, tasks=tasks, steps=steps))
    parameters = sum(p.numel() * p.element_size() for p in case.params.values())
    return measure_calls(lambda: Metafast().prepare(case)) | {"parameters": parameters}


def _peak(tasks: int, steps: int, given: argparse.Namespace) -> dict:
    found = in_fresh("bench.claims.memory", f"{tasks},{steps}", given)
    print(f"{tasks:4} tasks, {steps:2} steps: peak {found['peak'] / 2**20:.1f} MiB above the data")
    return found


def measure(given: argparse.Namespace) -> list[Claim]:
    """Growth over tasks at one step, and over steps at 8 tasks beyond the checkpoints."""
    all_tasks, all_steps = ((2, 8), (1, 2)) if given.quick else (TASKS, STEPS)
    by_tasks = [_peak(tasks, 1, given)["peak"] for tasks in all_tasks]
    by_steps = [_peak(all_tasks[0], steps, given) for steps in all_steps]
    checkpoints = (all_steps[-1] - all_steps[0]) * given.threads * by_steps[0]["parameters"]
    beyond = by_steps[-1]["peak"] - checkpoints
    tasks, steps = (f"{found[0]} to {found[-1]}" for found in (all_tasks, all_steps))
    return [
        Claim(f"growth of the peak, {tasks} tasks", 100 * (by_tasks[-1] / by_tasks[0] - 1), 5, "%"),
        Claim(f"growth beyond checkpoints, {steps} steps", 100 * (beyond / by_steps[0]["peak"] - 1), 5, "%"),
    ]


if __name__ == "__main__":
    run(__doc__, measure, child)
