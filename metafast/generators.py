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
from torch import nn

from .attributes import Attributes

if TYPE_CHECKING:
    from .problem import Problem

__all__ = ["Draws", "Generator", "plain"]

Generator = tuple[str, Callable[[], Any], Callable[[Any], Any]]
"""Its name, how to read its state, and how to set it."""


class Draws:
    """The states of PyTorch's, Python's and NumPy's own generators, of those that the losses of a problem read, and the
    attributes of its model."""

    def __init__(self, generators: list[Generator], model: nn.Module | None = None) -> None:
        self._generators, self._model = generators, model
        self._states = [read() for _, read, _ in generators]
        self._attributes = None if model is None else Attributes(model)

    @classmethod
    def of(cls, problem: Problem) -> Draws:
        """Of all generators that a run of its losses may draw from, and of its model."""
        return cls(_generators(problem), problem.model)

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
        now = Draws(self._generators, self._model)
        self.restore()
        try:
            yield
        finally:
            now.restore()

    def restore(self) -> None:
        """Set all of them back."""
        for (_, _, put), state in zip(self._generators, self._states, strict=True):
            put(state)
        if self._attributes is not None:
            self._attributes.restore()


def plain(state: Any) -> Any:
    """The state of a generator, to compare."""
    if isinstance(state, torch.Tensor):
        return state.numpy().tobytes()
    if isinstance(state, tuple):
        return tuple([part if type(part) is int else plain(part) for part in state])  # Python's own has 625 of them
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
