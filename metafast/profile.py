"""Where the time of a native call goes: every instruction, timed by itself on one thread."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Profile", "Row"]


@dataclass(frozen=True)
class Row:
    """One instruction: how often it ran in one call, and in all `seconds`, floating-point operations and bytes.

    `flops` counts direct algorithms (a 3×3 convolution as 9 products a pixel, whatever computes it); `nbytes` every
    operand once. Timing an instruction costs some 25 ns, which is in `seconds`.
    """

    section: str
    index: int
    kernel: str
    what: str
    calls: int
    seconds: float
    flops: float
    nbytes: float

    @property
    def gflops(self) -> float:
        """10⁹ floating-point operations a second."""
        return self.flops / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def gbytes(self) -> float:
        """10⁹ bytes a second."""
        return self.nbytes / self.seconds / 1e9 if self.seconds else 0.0


@dataclass(frozen=True)
class Profile:
    """What `InnerLoop.profile` returns: `rows` in the order of the program; print it, or `save` a picture."""

    rows: tuple[Row, ...]
    tasks: int
    steps: int

    @property
    def seconds(self) -> float:
        """The sum over all instructions: one call on one thread."""
        return sum(row.seconds for row in self.rows)

    def sections(self) -> list[Row]:
        """One row a section: its instructions together."""
        names = dict.fromkeys(row.section for row in self.rows)
        return [_together(name, [row for row in self.rows if row.section == name]) for name in names]

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        console = Console(file=text, width=120, highlight=False)
        console.print(self._table(f"{self.tasks} tasks, {self.steps} steps, one thread", self.rows))
        console.print(self._table("sections", [*self.sections(), _together("all", self.rows)]))
        return text.getvalue().rstrip("\n")

    def _table(self, title: str, rows: Sequence[Row]) -> object:
        from rich.table import Table

        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for name in ("section", "", "kernel", "what"):
            table.add_column(name, overflow="ellipsis", no_wrap=True)
        for name in ("calls", "µs a call", "ms", "%", "GFLOP/s", "GB/s"):
            table.add_column(name, justify="right", no_wrap=True)
        whole = self.seconds or 1.0
        for r in rows:
            index = str(r.index) if r.index >= 0 else ""
            each = 1e6 * r.seconds / max(r.calls, 1)
            cells = [f"{r.calls}", f"{each:.2f}", f"{1e3 * r.seconds:.3f}", f"{100 * r.seconds / whole:.1f}"]
            table.add_row(r.section, index, r.kernel, r.what, *cells, f"{r.gflops:.1f}", f"{r.gbytes:.1f}")
        return table

    def save(self, path: str | os.PathLike[str]) -> None:
        """Draw each section as a row of its instructions, as wide as their time; the format follows the suffix."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch

        kernels = sorted({row.kernel for row in self.rows}, key=self._share, reverse=True)
        colours = {kernel: f"C{k % 10}" for k, kernel in enumerate(kernels)}
        sections = self.sections()
        figure = Figure(figsize=(11, 1.6 + 0.6 * len(sections)), dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        for place, section in enumerate(sections):
            left = 0.0
            for row in (r for r in self.rows if r.section == section.section):
                width = 1e3 * row.seconds
                axes.barh(place, width, left=left, color=colours[row.kernel], edgecolor="white", linewidth=0.5)
                left += width
            text = f" {1e3 * section.seconds:.3g} ms, {section.gflops:.3g} GFLOP/s"
            axes.text(left, place, text, va="center", size=8)
        axes.set_yticks(range(len(sections)), [s.section for s in sections])
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_xlabel("ms on one thread")
        axes.set_title(f"{self.tasks} tasks, {self.steps} steps: {1e3 * self.seconds:.3g} ms", loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        shares = {k: f"{k} {100 * self._share(k) / (self.seconds or 1):.0f} %" for k in kernels}
        named = [Patch(color=colours[k], label=label) for k, label in shares.items()]
        axes.legend(handles=named, frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.savefig(path)

    def _share(self, kernel: str) -> float:
        return sum(row.seconds for row in self.rows if row.kernel == kernel)


def _together(section: str, rows: Sequence[Row]) -> Row:
    seconds, flops, nbytes = (sum(getattr(r, name) for r in rows) for name in ("seconds", "flops", "nbytes"))
    return Row(section, -1, "", f"{len(rows)} instructions", sum(r.calls for r in rows), seconds, flops, nbytes)
