"""What a worker holds between the inner loop and its way back: every state, or every n-th within a budget of memory.

Of K steps the states 0, n, 2n, ... are held, and those of one segment between two of them; on the way back every
segment but the last runs again from its first state. That makes ⌊K/n⌋ + n states instead of K + 1, for
(⌈K/n⌉ − 1)(n − 1) inner steps more: at n = √K some 2√K states for less than one more forward (Chen et al.,
arXiv:1604.06174; Griewank & Walther 2000, Algorithm 799, go on to less memory for more time). A state has the same bits
each time it is made, so the budget decides on time alone.

Which products steps keep with their states (keep.py) is decided before and without the budget: a way back that reads
them rounds differently from one that computes them again.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from metafast import _C
from metafast.errors import InputError, message

if TYPE_CHECKING:
    from metafast.division import Portion
    from metafast.problem import Problem

__all__ = ["Held", "held", "interval", "slots"]


@dataclass(frozen=True)
class Held:
    """States of every `every`-th step are held: `slots` of `slot_bytes` by each of `workers` threads."""

    every: int
    slots: int
    slot_bytes: int
    workers: int

    @property
    def nbytes(self) -> int:
        """Of all workers together."""
        return self.workers * self.slots * self.slot_bytes

    def __str__(self) -> str:
        which = "every step" if self.every == 1 else f"one step in {self.every}"
        return f"of {which}, {self.slots} × {self.slot_bytes} B × {self.workers} threads = {self.nbytes} B"


def held(portions: Sequence[Portion], problem: Problem) -> Held:
    """What a call of the programs holds at most: of every step, or of every n-th with the least n the budget allows.

    Raises InputError where the budget is less than any n needs.
    """
    steps, budget = problem.steps, problem.memory_budget
    workers = min(torch.get_num_threads(), sum(portion.blocks for portion in portions), _C.MOST_GROUPS)
    state_bytes = max(portion.lowered.state_bytes for portion in portions)
    if not any(portion.lowered.returns for portion in portions):
        every, count = 1, 2
    elif budget is None:
        every, count = 1, slots(steps, 1)
    else:
        every = interval(steps, budget // max(workers * state_bytes, 1))
        count = slots(steps, every)
    found = Held(every, count, state_bytes, workers)
    if budget is not None and found.nbytes > budget:
        place, got = f"InnerLoop(memory_budget=...), {steps} steps", f"{budget} bytes"
        need = f"{found.nbytes} or more: {count} states of {found.slot_bytes} bytes in each of {workers} threads"
        way_out = "allow as much, use fewer steps or threads (torch.set_num_threads), or adapt fewer parameters"
        raise InputError(message(place, got, need, way_out))
    return found


def slots(steps: int, every: int) -> int:
    """How many states are held at once, as csrc/frame.hpp lays them out."""
    return steps // every + every


@functools.lru_cache(maxsize=256)
def interval(steps: int, most: int) -> int:
    """The least n of which at most so many states are held; that of the fewest states where none is so few.

    >>> interval(100, 101), interval(100, 52), interval(100, 20), interval(100, 1)
    (1, 2, 10, 10)
    """
    candidates = range(1, math.isqrt(steps) + 2)  # the fewest are held at one of the two around √K
    return next((n for n in candidates if slots(steps, n) <= most), min(candidates, key=lambda n: slots(steps, n)))
