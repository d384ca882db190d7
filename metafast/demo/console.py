"""What the terminal shows: a live bar on a terminal, plain lines into a file or a pipe."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol, TextIO


class Track(Protocol):
    """One piece of work under way."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """`done` of `total` are finished; `note` says how it goes (loss, accuracy)."""


class Console:
    """Plain lines for each piece of work: the first, then `lines` evenly spread."""

    def __init__(self, file: TextIO | None = None, lines: int = 5) -> None:
        self.file = file or sys.stdout
        self.lines = lines

    def say(self, text: str = "") -> None:
        """Print one line."""
        print(text, file=self.file, flush=True)

    @contextmanager
    def track(self, title: str) -> Iterator[Track]:
        """Follow one piece of work: `with console.track("train") as at: at(step, steps, "loss 0.3")`."""
        printed = -1

        def at(done: int, total: int, note: str = "") -> None:
            nonlocal printed
            share = done * self.lines // max(total, 1)
            if share > printed:
                printed = share
                self.say(f"{title:<10} {done:>6}/{total}  {note}".rstrip())

        yield at


class LiveConsole(Console):
    """A progress bar by rich, redrawn in place and left standing when the work is done."""

    def __init__(self) -> None:
        super().__init__()
        import rich.console

        self.rich = rich.console.Console(highlight=False)

    def say(self, text: str = "") -> None:
        """Print one line."""
        self.rich.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def track(self, title: str) -> Iterator[Track]:
        """Follow one piece of work with a bar."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        with Progress(*columns, console=self.rich, refresh_per_second=8) as progress:
            bar = progress.add_task(title, total=None, note="")

            def at(done: int, total: int, note: str = "") -> None:
                progress.update(bar, completed=done, total=total, note=note)

            yield at


def make_console() -> Console:
    """A live one on a terminal, where rich is installed; plain lines otherwise."""
    if not sys.stdout.isatty():
        return Console()
    try:
        return LiveConsole()
    except ImportError:
        return Console()


class Stopwatch:
    """Seconds since it was made: `watch.seconds`."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self._start


class Stop:
    """Turns Ctrl-C into a wish (`wanted`) that loops look at between steps; a second one raises KeyboardInterrupt.

    Outside the main thread, where Python delivers no signals, it does nothing.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._previous: Any = None

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def take(self) -> bool:
        """Whether it was wanted since last asked; forgets it."""
        wanted, self.wanted = self.wanted, False
        return wanted

    def _note(self, _signal: int, _frame: FrameType | None) -> None:
        if self.wanted:
            raise KeyboardInterrupt
        self.wanted = True
