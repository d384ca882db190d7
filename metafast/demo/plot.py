"""The picture at the end: one test task, accuracy against inner steps, loss against training steps."""

from __future__ import annotations

import textwrap
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from .glyphs import SIZE, TEST_ALPHABETS
from .job import Results
from .train import Accuracy, Example, Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#8A8A8A"
MOST_WAYS, MOST_SHOTS, MOST_QUERIES = 6, 5, 10  # shown; a picture of 20 ways would show nothing
GAP = 4  # pixels between images

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "legend.frameon": False,
}


def save(results: Results, path: Path) -> None:
    """Draw `results` to the PNG at `path`, replacing it. Touches no global matplotlib state and needs no display."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(cast(Any, STYLE)):
        figure = Figure(figsize=(11, 7.4), dpi=150, layout=ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08, hspace=0.06))
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(2, 1, height_ratios=[1.15, 1])
        top = grid[0].subgridspec(1, 2, width_ratios=[2.1, 1])
        bottom = grid[1].subgridspec(1, 2)
        draw_task(figure.add_subplot(top[0]), results.example)
        draw_numbers(figure.add_subplot(top[1]), results)
        draw_adaptation(figure.add_subplot(bottom[0]), results)
        draw_training(figure.add_subplot(bottom[1]), results)
        figure.suptitle(headline(results), x=0.012, ha="left", fontsize=13, fontweight="bold")
        figure.savefig(path)


def headline(results: Results) -> str:
    """What was trained, in a line."""
    settings = results.settings
    order = {1: "first order", 2: "second order"}[settings.order]
    return f"{settings.ways}-way {settings.shots}-shot MAML, {order}, conv4-{settings.filters}, on unseen alphabets"


def draw_task(axes: Axes, example: Example) -> None:
    """Support on the left, query on the right; a frame says whether the adapted net names the letter."""
    ways = min(len(example.letters), MOST_WAYS)
    shots, queries = min(example.support.shape[1], MOST_SHOTS), min(example.query.shape[1], MOST_QUERIES)
    pitch = SIZE + GAP
    start = shots + 0.6  # columns; a gap between support and query
    for row in range(ways):
        top = float(row * pitch)
        for column in range(shots):
            place(axes, example.support[row, column].numpy(), column * pitch, top)
            frame(axes, column * pitch, top, "#D0D0D0")
        for column in range(queries):
            left = (start + column) * pitch
            place(axes, example.query[row, column].numpy(), left, top)
            frame(axes, left, top, GREEN if example.after[row, column] else RED)
        axes.text(-GAP, (row + 0.43) * pitch, letter_name(example.letters[row]), ha="right", va="center", fontsize=8.5)
    axes.set_xlim(-4.3 * pitch, (start + queries) * pitch + GAP)
    axes.set_ylim(ways * pitch, -0.6 * pitch)
    axes.set_anchor("W")
    axes.set_aspect("equal")
    axes.axis("off")
    axes.text(0, -0.2 * pitch, "support", fontweight="bold", va="bottom")
    before, after = float(example.before.float().mean()), float(example.after.float().mean())
    note = f"query: {100 * before:.0f} % right before, {100 * after:.0f} % after"
    axes.text(start * pitch, -0.2 * pitch, note, fontweight="bold", va="bottom")


def place(axes: Axes, picture: npt.NDArray[np.float32], left: float, top: float) -> None:
    """Show one image, dark ink on white, with its upper left corner at (left, top)."""
    height, width = picture.shape
    extent = (left, left + width, top + height, top)
    axes.imshow(picture, cmap="gray_r", vmin=0, vmax=1, extent=extent, interpolation="bilinear")


def frame(axes: Axes, left: float, top: float, color: str) -> None:
    """A frame around the image at (left, top)."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((left - 1, top - 1), SIZE + 2, SIZE + 2, fill=False, ec=color, lw=1.6))


def letter_name(letter: str) -> str:
    """The letter's Unicode name, on at most two lines."""
    name = unicodedata.name(letter, "unnamed").replace(" LETTER", "").capitalize()
    return "\n".join(textwrap.wrap(name, 26, max_lines=2, placeholder=" …"))


def draw_numbers(axes: Axes, results: Results) -> None:
    """The main numbers, large enough to be read first."""
    axes.axis("off")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    entries = [
        (f"{100 * results.after.mean:.1f} %", f"right after adaptation (± {100 * results.after.interval:.1f})"),
        (f"{100 * results.before.mean:.1f} %", f"right before it (± {100 * results.before.interval:.1f})"),
    ]
    if results.reference_curve:
        after = results.reference_curve[-1]
        entries += [(f"{100 * after.mean:.1f} %", f"reference, same seed (± {100 * after.interval:.1f})")]
    entries += [(f"{results.tasks_per_second:.0f}", "tasks a second in training")]
    if results.race:
        entries += [(f"{results.race.ratio:.1f}×", "as fast as a plain PyTorch loop")]
    for row, (number, meaning) in enumerate(entries):
        height = 0.9 - row * 0.185
        axes.text(0.26, height, number, ha="right", va="baseline", fontsize=15, fontweight="bold", color=BLUE)
        axes.text(0.31, height, meaning, ha="left", va="baseline", fontsize=9.5)
    note = f"{results.after.tasks} tasks from {', '.join(map(str.capitalize, TEST_ALPHABETS))}"
    axes.text(0.31, 0.9 - len(entries) * 0.185 + 0.05, note, fontsize=8.5, color=GREY)


def draw_adaptation(axes: Axes, results: Results) -> None:
    """Accuracy on the test alphabets against inner steps, with 95 % intervals, chance, and the reference."""
    steps = np.arange(len(results.curve))
    mean, interval = percent(results.curve)
    axes.fill_between(steps, mean - interval, mean + interval, color=BLUE, alpha=0.2, lw=0)
    axes.plot(steps, mean, "o-", color=BLUE, label=f"{results.backend} backend", ms=5)
    if results.reference_curve:
        ends = [0, results.settings.inner_steps]
        mean, interval = percent(results.reference_curve)
        axes.errorbar(ends, mean, interval, fmt="D", color=ORANGE, mfc="none", ms=9, capsize=3, label="reference")
    chance = 100 / results.settings.ways
    axes.axhline(chance, color=GREY, ls="--", lw=1)
    axes.annotate("chance", (steps[-1], chance), xytext=(0, 3), textcoords="offset points", ha="right", color=GREY)
    axes.axvline(results.settings.inner_steps, color=GREY, ls=":", lw=1)
    axes.text(results.settings.inner_steps + 0.06, 3, "as trained", color=GREY)
    axes.set(title="Adaptation to letters never seen", xlabel="inner steps", ylabel="query accuracy, %")
    axes.set(ylim=(0, 101), xticks=steps)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 0.24))


def percent(curve: list[Accuracy]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Means and half intervals in per cent."""
    return np.array([100 * a.mean for a in curve]), np.array([100 * a.interval for a in curve])


def draw_training(axes: Axes, results: Results) -> None:
    """Meta-loss against outer steps: each step faintly, the running mean on top; the reference beside it."""
    draw_losses(axes, results.training, BLUE, f"{results.backend} backend")
    if results.reference_training:
        draw_losses(axes, results.reference_training, ORANGE, "reference, same seed")
    axes.set(title="Meta-training", xlabel="outer step", ylabel="query loss after adaptation")
    axes.set_ylim(bottom=0)
    axes.margins(x=0.01)
    axes.legend(loc="upper right")


def draw_losses(axes: Axes, training: Training, color: str, label: str) -> None:
    """One loss curve."""
    losses = np.array(training.losses)
    width = max(1, len(losses) // 30)
    kernel = np.ones(width) / width
    smooth = np.convolve(losses, kernel, "valid")
    axes.plot(np.arange(len(losses)) + 1, losses, color=color, alpha=0.18, lw=0.7)
    axes.plot(np.arange(len(smooth)) + 1 + (width - 1) / 2, smooth, color=color, lw=1.8, label=label)
