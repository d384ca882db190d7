"""The whole job, from the settings to the results: train, test, race, compare, summarise."""

from __future__ import annotations

import platform
import re
import statistics
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

import metafast

from .console import Console, Stop, Stopwatch
from .glyphs import TEST_ALPHABETS, TRAIN_ALPHABETS, Glyphs
from .settings import Settings
from .train import (
    Accuracy,
    Example,
    Race,
    Training,
    make_example,
    make_inner,
    make_net,
    make_sampler,
    race,
    test,
    train,
)

REFERENCE = "torch"  # the backend that is PyTorch itself, task by task
CURVE_STEPS = 5  # the adaptation curve goes at least this far
ALIKE = 1e-4  # relative; a thousand roundings of float32


@dataclass
class Results:
    """Everything the demo found out. What an interrupted run did not reach is None."""

    settings: Settings
    data: dict[str, Any]
    backend: str
    training: Training
    curve: list[Accuracy]
    example: Example
    reference_training: Training | None = None
    reference_curve: list[Accuracy] | None = None
    race: Race | None = None
    interrupted: bool = False
    seconds: float = 0.0

    @property
    def before(self) -> Accuracy:
        """Accuracy of the trained net as it is."""
        return self.curve[0]

    @property
    def after(self) -> Accuracy:
        """Accuracy after as many inner steps as it was trained with."""
        return self.curve[self.settings.inner_steps]

    @property
    def tasks_per_second(self) -> float:
        """Training throughput, from the median step (so without the first one, which compiles)."""
        return self.settings.tasks / statistics.median(self.training.seconds)

    @property
    def steps_alike(self) -> int | None:
        """How many steps the reference's losses are ours to 1e-4; from there on rounding has parted the two runs."""
        if self.reference_training is None:
            return None
        pairs = zip(self.training.losses, self.reference_training.losses, strict=True)
        apart = (step for step, (ours, theirs) in enumerate(pairs) if abs(ours - theirs) > ALIKE * abs(theirs))
        return next(apart, len(self.training.losses))

    def as_json(self) -> dict[str, Any]:
        """Plain lists, numbers and strings, for `json.dump`."""
        return {
            "settings": asdict(self.settings),
            "versions": versions(),
            "data": self.data,
            "backend": self.backend,
            "interrupted": self.interrupted,
            "seconds": self.seconds,
            "steps_done": len(self.training.losses),
            "tasks_per_second": self.tasks_per_second,
            "first_step_seconds": self.training.seconds[0],
            "accuracy_before": asdict(self.before),
            "accuracy_after": asdict(self.after),
            "curve": [asdict(a) for a in self.curve],
            "reference_accuracy_before": self.reference_curve and asdict(self.reference_curve[0]),
            "reference_accuracy_after": self.reference_curve and asdict(self.reference_curve[-1]),
            "reference_steps_alike": self.steps_alike,
            "eager": self.race and asdict(self.race) | {"ratio": self.race.ratio},
            "losses": self.training.losses,
            "train_accuracy": self.training.probes,
            "reference_losses": self.reference_training and self.reference_training.losses,
        }


def versions() -> dict[str, Any]:
    """What the numbers were measured with."""
    return {
        "metafast": metafast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def run(settings: Settings, glyphs: Glyphs, console: Console) -> Results:
    """Train, test, compare. Ctrl-C ends the part under way and goes on with what there is; twice, it leaves."""
    watch = Stopwatch()
    with Stop() as stop:
        backend, remark = choose_backend(settings, glyphs)
        if remark:
            console.say(remark)
        with console.track("training") as at:
            training = train(settings, glyphs, backend, at, stop)
        interrupted = stop.take()
        steps = range(max(CURVE_STEPS, settings.inner_steps) + 1)
        with console.track("testing") as at:
            curve = test(training.net, settings, glyphs, backend, steps, at, stop)
        example = make_example(training.net, settings, glyphs, backend)
        data = describe_data(glyphs)
        results = Results(settings, data, backend, training, curve, example, interrupted=interrupted)
        if not (results.interrupted or stop.wanted):
            with console.track("plain loop") as at:
                results.race = race(training.net, settings, glyphs, backend, at)
        if settings.reference and backend != REFERENCE and not (results.interrupted or stop.wanted):
            compare_with_reference(results, glyphs, console, stop)
        results.interrupted |= stop.take()
    results.seconds = watch.seconds
    return results


def compare_with_reference(results: Results, glyphs: Glyphs, console: Console, stop: Stop) -> None:
    """Train and test once more, all of it on the reference backend, from the same seed."""
    settings = results.settings
    with console.track("reference") as at:
        training = train(settings, glyphs, REFERENCE, at, stop)
    if stop.wanted:
        return
    with console.track("testing it") as at:
        curve = test(training.net, settings, glyphs, REFERENCE, (0, settings.inner_steps), at, stop)
    results.reference_training, results.reference_curve = training, curve


def choose_backend(settings: Settings, glyphs: Glyphs) -> tuple[str, str]:
    """The backend that takes this job, by its name, and what was said where it is a fallback.

    One small call tells: whatever falls back warns.
    """
    support, query = make_sampler(glyphs, settings, TRAIN_ALPHABETS, settings.seed).sample(1)
    inner = make_inner(make_net(settings), settings, settings.backend)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", metafast.FallbackWarning)
        inner(support, query)
        text = str(inner.explain(support, query))
    found = re.search(r"backend:\s*(\w+)", text)
    remarks = [str(w.message) for w in caught if issubclass(w.category, metafast.FallbackWarning)]
    return found[1] if found else settings.backend, " ".join(remarks[:1])


def describe_data(glyphs: Glyphs) -> dict[str, Any]:
    """Counts of letters and examples, for the report."""
    alphabets = {name: glyphs.alphabets.count(name) for name in TRAIN_ALPHABETS + TEST_ALPHABETS}
    return {
        "letters": alphabets,
        "examples": len(glyphs.images),
        "train_alphabets": TRAIN_ALPHABETS,
        "test_alphabets": TEST_ALPHABETS,
        "left_out": asdict(glyphs.tally),
    }


@contextmanager
def flushed_subnormals() -> Iterator[None]:
    """Flush subnormals to zero in PyTorch as well, which speeds the plain loop up severalfold.

    PyTorch's threads inherit the mode from the thread that starts them: enter this before its first parallel work.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


# ---------------------------------------------------------------------------------------------- in words


def describe_letters(glyphs: Glyphs) -> list[str]:
    """The data set in two lines."""
    count = {name: glyphs.alphabets.count(name) for name in TRAIN_ALPHABETS + TEST_ALPHABETS}
    tally = glyphs.tally
    train, test = (
        f"{sum(count[n] for n in names)} ({', '.join(f'{n.capitalize()} {count[n]}' for n in names)})"
        for names in (TRAIN_ALPHABETS, TEST_ALPHABETS)
    )
    return [
        f"Letters: {train} to train, {test} to test; {len(glyphs.images)} images",
        f"Left out of {tally.letters}: {tally.other_scripts} of no alphabet, {tally.repeated} repeats, {tally.leaking} "
        f"test letters that look like a training letter ({tally.identical} of them pixel for pixel)",
    ]


def summary(results: Results) -> list[str]:
    """What came out, for the terminal."""
    settings, names = results.settings, " ".join(name.capitalize() for name in TEST_ALPHABETS)
    steps = "1 inner step" if settings.inner_steps == 1 else f"{settings.inner_steps} inner steps"
    rows = [(results.backend, results.before, results.after)]
    if results.reference_curve:
        rows.append(("reference, same seed", results.reference_curve[0], results.reference_curve[-1]))
    lines = ["", f"Accuracy on {names}, {results.after.tasks} tasks, 95 % interval"]
    lines += [f"  {'backend':<22}{'before adaptation':<20}after {steps}"]
    lines += [f"  {name:<22}{before!s:<20}{after}" for name, before, after in rows]
    lines += [f"  (guessing would be right in {100 / settings.ways:.1f} %)", ""]
    if results.steps_alike is not None:
        lines += [
            f"The two trainings have the same losses to {ALIKE:.0e} for {results.steps_alike} of {settings.steps} steps"
            + ("." if results.steps_alike == settings.steps else "; then float32 rounding parts them."),
            "",
        ]
    milliseconds = 1000 * settings.tasks / results.tasks_per_second
    speed = f"{results.tasks_per_second:.0f} tasks/s ({milliseconds:.1f} ms a step of {settings.tasks} tasks)"
    lines += [f"Training: {speed}"]
    if results.race:
        lines += [
            f"The same step as a plain PyTorch loop: {1000 * results.race.eager_seconds:.1f} ms against "
            f"{1000 * results.race.metafast_seconds:.1f} ms, {results.race.ratio:.1f} times as long "
            f"(loss {results.race.eager_loss:.6f} against {results.race.metafast_loss:.6f})"
        ]
    if results.interrupted:
        lines += [f"Interrupted after {len(results.training.losses)} of {settings.steps} steps."]
    return [*lines, f"Total: {results.seconds:.0f} s"]
