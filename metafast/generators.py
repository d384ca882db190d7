"""Where the random generators that losses may draw from stand: to draw the same again, or as if none had been drawn.

Plain attributes of the model's modules go along: a pass counts in them, or notes there what it has filled.
"""

from __future__ import annotations

import contextlib
import functools
import random
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from .attributes import Attributes

if TYPE_CHECKING:
    from .problem import Problem

__all__ = ["Draws"]

Generator = tuple[Callable[[], Any], Callable[[Any], Any]]
"""How to read a state, of a generator or of the model's attributes, and how to set it."""


class Draws:
    """The states of PyTorch's, Python's and NumPy's own generators, of those that the losses of a problem read, and the
    attributes of its model."""

    def __init__(self, generators: list[Generator]) -> None:
        self._generators = generators
        self._states = [read() for read, _ in generators]

    @classmethod
    def of(cls, problem: Problem) -> Draws:
        """Of all generators that a run of its losses may draw from."""
        return cls(_generators(problem))

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Draw from there on, and leave the generators as they are."""
        now = Draws(self._generators)
        self.restore()
        try:
            yield
        finally:
            now.restore()

    def restore(self) -> None:
        """Set all of them back."""
        for (_, put), state in zip(self._generators, self._states, strict=True):
            put(state)


def _generators(problem: Problem) -> list[Generator]:
    found: list[Generator] = [(functools.partial(Attributes, problem.model), Attributes.restore)]
    found += [(torch.get_rng_state, torch.set_rng_state), (random.getstate, random.setstate)]
    device = problem.parameter.device
    if device.type == "cuda":
        read, put = torch.cuda.get_rng_state, torch.cuda.set_rng_state
        found.append((functools.partial(read, device), functools.partial(put, device=device)))
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        found.append((numpy.random.get_state, numpy.random.set_state))
    return found + ([] if problem.reach is None else problem.reach.generators())
