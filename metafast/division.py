"""Which programs do the tasks of a call: blocks of them side by side in the lanes of vectors, the rest one by one."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from metafast import _C
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


LANE = 0.75  # time of a task in a block, of that of a task by itself: measured with AVX2 and AVX-512 (bench/LEDGER.md)
LEAST_GAIN = 0.04  # of the time, that tasks side by side, or a second program, must promise: a guess


def divided(state: Mapping[str, Shape], itemsize: int, tasks: int) -> Division:
    """How so many tasks are done in least time on the cores there are.

    `state` has what a step hands to the next. How many threads a call may use plays no part: no bit depends on it.
    """
    vector = int(_C.vector_bytes())
    lanes = vector // itemsize
    if sum(map(numel, state.values())) * itemsize * lanes > _most_state_bytes(vector):
        return ((1, tasks),)
    return _quickest(lanes, tasks, _cores())


def _most_state_bytes(vector: int) -> int:
    """Bytes of the parameters of all lanes of a vector of so many bytes: a fraction of the second-level cache.

    Most processors with AVX-512 have 1 to 2 MiB of it a core, others half as much. It sees neither rows nor widths,
    and so takes some nets that are quicker one by one (bench/LEDGER.md).
    """
    return 1 << 17 if vector >= 64 else 1 << 16


@functools.cache
def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.lru_cache(maxsize=256)
def _quickest(lanes: int, tasks: int, cores: int) -> Division:
    """All one by one, or as many blocks as keep every core at work, and the rest one by one.

    >>> _quickest(8, 32, 2), _quickest(8, 25, 2), _quickest(8, 7, 2)
    (((8, 32),), ((8, 16), (1, 9)), ((1, 7),))
    """
    most = tasks // lanes
    some = [((lanes, n * lanes), (1, tasks - n * lanes)) for n in range(max(most - cores, 1), most + 1)]
    candidates: list[Division] = [((1, tasks),), *[tuple(pair for pair in both if pair[1]) for both in some]]
    return min(candidates, key=lambda division: _time(division, cores))


def _time(division: Division, cores: int) -> float:
    """A guess, in times of one task: cores take blocks, then tasks, as they come."""
    blocks = sum(count // lanes for lanes, count in division if lanes > 1)
    rest = sum(count for lanes, count in division if lanes == 1)
    block = LANE * division[0][0]
    time = max(-(-blocks // cores) * block, math.ceil((blocks * block + rest) / cores))
    return time * (1 + LEAST_GAIN * (len(division) - (not blocks)))
