"""Losses that draw or count: they fall back, draw the same again on the way back, and nothing where they fail."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_reach import tasks
from torch import Tensor, nn

import metafast

pytest.importorskip("metafast._C")


def counter() -> Callable[[], float]:
    calls = [0]

    def draw() -> float:
        calls[0] += 1
        return float(calls[0])

    return draw


def generator() -> Callable[[], float]:
    numbers = (float(n) for n in range(1, 100))
    return lambda: next(numbers)


def itertools_counter() -> Callable[[], float]:
    numbers = itertools.count(1)
    return lambda: float(next(numbers))


_DRAWS = [counter, generator, itertools_counter]
_DRAWS += [lambda: np.random.default_rng(0).normal, lambda: random.Random(0).random]


@pytest.mark.parametrize("draw", _DRAWS)
def test_a_loss_that_reads_what_it_changes_falls_back_once(draw: Callable[[], Callable[[], float]]) -> None:
    net, number = nn.Linear(3, 2).double(), draw()
    inner = metafast.InnerLoop(net, lambda out, y: F.mse_loss(out, y) * number(), update=metafast.SGD(lr=0.1), steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = [inner(*tasks()).item() for _ in range(3)]
    assert [w.category for w in caught] == [metafast.FallbackWarning]
    assert "changes what they read" in str(caught[0].message)
    assert len(set(losses)) == 3


def with_a_generator() -> tuple[Callable[[], float], Callable[[], None]]:
    held = torch.Generator()
    return lambda: float(torch.rand((), generator=held)), lambda: held.manual_seed(0)


def with_a_python_generator() -> tuple[Callable[[], float], Callable[[], None]]:
    held = random.Random()
    return lambda: held.random(), lambda: held.seed(0)


def with_a_numpy_generator() -> tuple[Callable[[], float], Callable[[], None]]:
    held, start = np.random.default_rng(0), np.random.default_rng(0).bit_generator.state
    return lambda: held.random(), lambda: setattr(held.bit_generator, "state", start)


SEEDED: dict[str, Any] = {
    "python": lambda: (lambda: random.random(), lambda: random.seed(0)),
    "numpy": lambda: (lambda: np.random.rand(), lambda: np.random.seed(0)),
    "generator": with_a_generator,
    "python generator": with_a_python_generator,
    "numpy generator": with_a_numpy_generator,
}


@pytest.mark.parametrize("make", SEEDED.values(), ids=SEEDED)
@pytest.mark.filterwarnings("ignore::metafast.FallbackWarning")
def test_a_deferred_backward_draws_the_same_again(make: Any) -> None:
    draw, seed = make()
    model = nn.Linear(3, 2).double()
    found = []
    for reduction in ("mean", "none"):
        inner = metafast.InnerLoop(
            model, lambda out, y: F.mse_loss(out, y) * draw(), update=metafast.SGD(lr=0.1), steps=2, reduction=reduction
        )
        inner(*tasks())
        seed()
        model.zero_grad()
        inner(*tasks()).mean().backward()
        found.append([draw(), *(p.grad for p in model.parameters())])
    assert found[0][0] == found[1][0]  # both leave it where one pass over the tasks did
    torch.testing.assert_close(found[1][1:], found[0][1:])


@pytest.mark.parametrize("make", SEEDED.values(), ids=SEEDED)
@pytest.mark.parametrize("fails", ["raises", "is not finite"])
@pytest.mark.filterwarnings("ignore::metafast.FallbackWarning", "ignore::metafast.NonFiniteWarning")
def test_after_an_error_nothing_has_been_drawn(make: Any, fails: str) -> None:
    draw, seed = make()
    wrong = [False]

    def loss(out: Tensor, y: Tensor) -> Tensor:
        value = F.mse_loss(out, y) * draw()
        if not wrong[0]:
            return value
        if fails == "raises":
            raise ValueError("no")
        return value * float("inf")

    inner = metafast.InnerLoop(nn.Linear(3, 2).double(), loss, update=metafast.SGD(lr=0.1), steps=2, nonfinite="raise")
    inner(*tasks())
    seed()
    expected = draw()
    seed()
    wrong[0] = True
    with pytest.raises(metafast.MetafastError):
        inner(*tasks())
    assert draw() == expected
