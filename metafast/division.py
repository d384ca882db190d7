"""Which programs do the tasks of a call: blocks of them side by side in the lanes of vectors, the rest one by one."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from metafast import _C
from metafast.cost import Work, lane
from metafast.graph import Shape
from metafast.ops import numel

if TYPE_CHECKING:
    from metafast.lower import Lowered

__all__ = ["Division", "Portion", "divided"]

Division = tuple[tuple[int, int], ...]
"""Pairs (lanes, tasks): how many tasks at once, and how many in all, a multiple of that."""


class Portion(NamedTuple):
    """A program, and how many tasks of a call it does; those of the portion before it come first."""

    lowered: Lowered
    tasks: int

    @property
    def blocks(self) -> int:
        """How often the program runs."""
        return self.lowered.blocks(self.tasks)


MOST_STATE_BYTES = 1 << 20  # of a block: a second-level cache, and what `bench.calibrate` has measured
LEAST_GAIN = 0.04  # of the time, that blocks, or a second program, must promise: half of what guesses are off


def divided(state: Mapping[str, Shape], itemsize: int, tasks: int, work: Callable[[], Work]) -> Division:
    """How so many tasks are done in least time on the cores there are.

    `state` has what a step hands to the next, `work` gives what a task does. How many threads a call may use plays no
    part: no bit depends on it.
    """
    vector = int(_C.vector_bytes())
    lanes = vector // itemsize
    if tasks < lanes or sum(map(numel, state.values())) * itemsize * lanes > MOST_STATE_BYTES:
        return ((1, tasks),)
    return _quickest(lanes, tasks, _cores(), round(lane(work(), lanes, vector), 2))


@functools.cache
def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.lru_cache(maxsize=256)
def _quickest(lanes: int, tasks: int, cores: int, lane: float) -> Division:
    """All one by one, or as many blocks as keep every core at work, and the rest one by one.

    `lane` is the time of a task in a block, of that of a task by itself.

    >>> _quickest(8, 32, 2, 0.75), _quickest(8, 25, 2, 0.75), _quickest(8, 7, 2, 0.75)
    (((8, 32),), ((8, 16), (1, 9)), ((1, 7),))
    """
    most = tasks // lanes
    some = [((lanes, n * lanes), (1, tasks - n * lanes)) for n in range(max(most - cores, 1), most + 1)]
    candidates: list[Division] = [((1, tasks),), *[tuple(pair for pair in both if pair[1]) for both in some]]
    return min(candidates, key=lambda division: _time(division, cores, lane))


def _time(division: Division, cores: int, lane: float) -> float:
    """A guess, in times of one task: cores take blocks, then tasks, as they come."""
    blocks = sum(count // lanes for lanes, count in division if lanes > 1)
    rest = sum(count for lanes, count in division if lanes == 1)
    block = lane * division[0][0]
    time = max(-(-blocks // cores) * block, math.ceil((blocks * block + rest) / cores))
    return time * (1 + LEAST_GAIN * (len(division) - (not blocks)))
