"""Where the random generators that losses may draw from stand: to draw the same again, or as if none had been drawn."""

from __future__ import annotations

import contextlib
import functools
import random
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .problem import Problem

__all__ = ["Draws", "Generator", "plain"]

Generator = tuple[str, Callable[[], Any], Callable[[Any], Any]]
"""Its name, how to read its state, and how to set it."""


class Draws:
    """The states of PyTorch's, Python's and NumPy's own generators, and of those that the losses of a problem read."""

    def __init__(self, generators: list[Generator]) -> None:
        self._generators = generators
        self._states = [read() for _, read, _ in generators]

    @classmethod
    def of(cls, problem: Problem) -> Draws:
        """Of all generators that a run of its losses may draw from."""
        return cls(_generators(problem))

    @classmethod
    def everywhere(cls) -> Draws:
        """Of the generators that any code may draw from, those of a GPU left out."""
        return cls(_global_generators())

    def drawn(self) -> str | None:
        """The name of a generator that no longer stands there, if one does not."""
        for (name, read, _), state in zip(self._generators, self._states, strict=True):
            if plain(read()) != plain(state):
                return name
        return None

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
        for (_, _, put), state in zip(self._generators, self._states, strict=True):
            put(state)


def plain(state: Any) -> Any:
    """The state of a generator, to compare."""
    if isinstance(state, torch.Tensor):
        return state.numpy().tobytes()
    if isinstance(state, tuple):
        return tuple([plain(part) for part in state])
    if isinstance(state, dict):
        return {name: plain(part) for name, part in state.items()}
    return state.tobytes() if hasattr(state, "tobytes") else state


def _global_generators() -> list[Generator]:
    found: list[Generator] = [
        ("torch", torch.get_rng_state, torch.set_rng_state),
        ("random", random.getstate, random.setstate),
    ]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        found.append(("numpy.random", numpy.random.get_state, numpy.random.set_state))
    return found


def _generators(problem: Problem) -> list[Generator]:
    found = _global_generators()
    device = problem.parameter.device
    if device.type == "cuda":
        read, put = torch.cuda.get_rng_state, torch.cuda.set_rng_state
        found.append(("torch.cuda", functools.partial(read, device), functools.partial(put, device=device)))
    return found + ([] if problem.reach is None else problem.reach.generators())
