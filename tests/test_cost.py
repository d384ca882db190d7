"""What tasks are guessed to cost, by themselves and side by side, against times that were measured."""

from __future__ import annotations

import functools
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: an installed metafast goes first

from bench.calibrate import Net, work
from metafast import cost
from metafast.division import LEAST_GAIN

# Microseconds of a task by itself and in a block: with AVX-512, with AVX2 (`python -m bench.calibrate`, Zen 5, one
# thread; a random part of its nets).
MEASURED = [
    (Net((1, 32, 32, 1), 3, 1, 2), (2.44, 0.991), (4.06, 1.66)),
    (Net((1, 32, 32, 1), 3, 3, 1), (2.64, 1.04), (4.54, 1.83)),
    (Net((1, 40, 40, 1), 75, 3, 2), (45.9, 47.4), (76.4, 72.5)),
    (Net((1, 64, 64, 1), 3, 3, 1), (4.93, 4.5), (8.32, 5.03)),
    (Net((1, 64, 64, 1), 75, 3, 1), (37.1, 45.9), (67.4, 74.3)),
    (Net((1, 64, 64, 1), 75, 3, 2), (87.6, 121), (164, 199)),
    (Net((1, 80, 80, 1), 10, 1, 1), (5.39, 5.02), (9.49, 8.58)),
    (Net((1, 80, 80, 1), 10, 1, 2), (9.9, 9.88), (16.9, 16.1)),
    (Net((1, 80, 80, 1), 75, 1, 2), (55.8, 77.1), (100, 114)),
    (Net((1, 80, 80, 1), 75, 3, 1), (55.7, 71.9), (102, 103)),
    (Net((1, 100, 100, 1), 3, 1, 2), (12.6, 8.04), (15.8, 10.2)),
    (Net((1, 100, 100, 1), 75, 1, 1), (51, 61.2), (89.7, 82.6)),
    (Net((1, 100, 100, 1), 75, 1, 2), (94.6, 133), (177, 170)),
    (Net((2, 64, 2), 10, 1, 2), (2.92, 0.827), (4.21, 1.47)),
    (Net((2, 64, 2), 75, 1, 1), (5.19, 4.15), (7.15, 4.06)),
    (Net((3, 24, 24, 24, 24, 1), 3, 3, 1), (5.51, 1.76), (6.79, 2.9)),
    (Net((4, 20, 3), 3, 1, 1), (0.985, 0.251), (1.95, 0.45)),
    (Net((4, 20, 3), 75, 3, 2), (20.9, 4.54), (18.4, 7.02)),
    (Net((10, 32, 32, 32, 2), 10, 3, 1), (7.16, 3.81), (10.9, 6.73)),
    (Net((10, 32, 32, 32, 2), 75, 1, 2), (24.8, 28.3), (42.7, 46.6)),
    (Net((10, 100, 1), 3, 1, 1), (1.55, 0.566), (3.05, 1.09)),
    (Net((16, 48, 48, 5), 3, 1, 1), (2.68, 1.48), (4.27, 2.42)),
    (Net((16, 48, 48, 5), 3, 3, 2), (8.93, 4.98), (14.5, 7.82)),
    (Net((16, 48, 48, 5), 10, 3, 2), (14.4, 10.4), (25, 17.3)),
    (Net((16, 48, 48, 5), 75, 1, 2), (29.5, 37.4), (52.4, 52.4)),
    (Net((16, 48, 48, 5), 75, 3, 2), (73.3, 95.1), (128, 129)),
    (Net((20, 120, 90, 10), 3, 1, 2), (13.5, 10), (17.4, 13.1)),
    (Net((20, 120, 90, 10), 10, 3, 2), (52.6, 54.3), (91.4, 76.3)),
    (Net((20, 120, 90, 10), 75, 3, 1), (122, 147), (227, 214)),
    (Net((32, 5), 3, 3, 2), (1.47, 0.327), (2.83, 0.616)),
    (Net((32, 5), 75, 1, 2), (4.17, 2.47), (3.63, 3.47)),
    (Net((64, 32, 5), 3, 3, 1), (2.91, 1.32), (5.3, 2.4)),
    (Net((1, 32, 32, 1), 20, 5, 2, activation="Tanh"), (27.8, 24.9), (44.9, 36.8)),
    (Net((1, 40, 40, 1), 20, 1, 2, norm=True), (18.9, 8.46), (18.6, 13.4)),
    (Net((2, 64, 2), 5, 5, 2, norm=True), (14.3, 4.03), (18, 6.34)),
    (Net((2, 64, 2), 20, 5, 2, norm=True), (29.5, 13.5), (36, 20.7)),
    (Net((2, 64, 2), 20, 5, 2, activation="Tanh", norm=True), (39.5, 22.5), (53, 37.2)),
    (Net((10, 100, 1), 5, 5, 2, norm=True), (17.7, 7.17), (27.4, 10.8)),
    (Net((16, 48, 48, 5), 5, 1, 2, activation="GELU"), (7.22, 4.82), (11.2, 7.77)),
    (Net((64, 32, 5), 20, 5, 2, activation="GELU"), (27.5, 24.7), (42.5, 34.4)),
]
COLUMN = {64: 1, 32: 2}
done = functools.cache(work)


def lane(net: Net, vector: int) -> float:
    """The guess: the time of a task in a block, of that of a task by itself."""
    return cost.lane(done(net), vector // (8 if net.dtype == "float64" else 4), vector)


@pytest.mark.parametrize("vector", COLUMN)
def test_the_choice_costs_little_beyond_the_better_way(vector: int) -> None:
    lost, always = [], []
    for row in MEASURED:
        alone, block = row[COLUMN[vector]]
        lost.append((block if lane(row[0], vector) < 1 else alone) / min(alone, block))
        always.append(block / min(alone, block))
    assert sum(lost) / len(lost) < 1.02 and max(lost) < 1.25
    assert max(always) > 1.2  # the table has nets that are slower side by side


@pytest.mark.parametrize("vector", COLUMN)
def test_guesses_are_near_what_was_measured(vector: int) -> None:
    off = [abs(lane(row[0], vector) * row[COLUMN[vector]][0] / row[COLUMN[vector]][1] - 1) for row in MEASURED]
    assert sorted(off)[len(off) // 2] < 0.15
    assert sorted(off)[len(off) // 2] > LEAST_GAIN  # what it stands for


def test_small_arrays_gain_most() -> None:
    net = Net((4, 20, 3), 10, 5)
    wider, longer = replace(net, widths=(4, 200, 3)), replace(net, rows=100)
    for vector in COLUMN:
        assert lane(net, vector) < lane(wider, vector) < 1.0
        assert lane(net, vector) < lane(longer, vector) < 1.0


def test_steps_count_as_often_as_they_run() -> None:
    """What a step takes is the same for each."""
    net = Net((4, 20, 3), 10, 1)
    one, two, five = (done(replace(net, steps=n)) for n in (1, 2, 5))
    for a, b, c in zip(one, two, five, strict=True):
        assert c - b == pytest.approx(3 * (b - a))
    assert one.runs == five.runs == 1.0 and five.products > one.products > 0
