"""The command line: `metafast demo`, `metafast bench`, `metafast --version`."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended
USAGE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["bench"]:  # its options are its own
        return bench(arguments[1:])
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return USAGE
    try:
        return demo(options)
    except KeyboardInterrupt:
        print("\nmetafast: interrupted", file=sys.stderr)
        return INTERRUPTED


def make_parser() -> argparse.ArgumentParser:
    """The options of every command, with their defaults."""
    import metafast

    parser = argparse.ArgumentParser(prog="metafast", description="Inner loops of meta-learning, compiled once.")
    parser.add_argument("--version", action="version", version=f"metafast {metafast.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    add_demo(commands.add_parser(
        "demo",
        help="meta-train on letters and test on alphabets never seen (under two minutes)",
        description="Meta-train MAML on letters drawn from matplotlib's fonts, test it on alphabets it has never "
        "seen, and compare with the PyTorch reference and a plain PyTorch loop. Needs no download.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    ))  # fmt: skip
    commands.add_parser("bench", help="measure (from a checkout); takes the options of python -m bench")
    return parser


def add_demo(parser: argparse.ArgumentParser) -> None:
    """Options of `metafast demo`. Defaults come from `Settings`, so that they are written once."""
    from metafast.demo.settings import Settings

    default = Settings()
    number = parser.add_argument
    number("--steps", type=at_least(1), default=default.steps, help="outer steps")
    number("--ways", type=at_least(2), default=default.ways, help="letters in a task")
    number("--shots", type=at_least(1), default=default.shots, help="support examples a letter")
    number("--queries", type=at_least(1), default=default.queries, help="query examples a letter")
    number("--tasks", type=at_least(1), default=default.tasks, help="tasks in an outer step")
    number("--inner-steps", type=at_least(0), default=default.inner_steps, help="steps of the inner loop")
    number("--inner-lr", type=positive, default=default.inner_lr, help="learning rate of the inner loop")
    number("--outer-lr", type=positive, default=default.outer_lr, help="learning rate of Adam")
    number("--filters", type=at_least(1), default=default.filters, help="filters in each convolution")
    number("--order", type=int, choices=(1, 2), default=default.order, help="1 is first-order MAML")
    number("--test-tasks", type=at_least(2), default=default.test_tasks, help="tasks from the test alphabets")
    number("--seed", type=at_least(0, 2**63 - 1), default=default.seed, help="of weights and tasks")
    number("--threads", type=at_least(1), default=None, help="threads of PyTorch and metafast; theirs if not given")
    number("--backend", choices=("auto", "native", "torch"), default=default.backend, help="who computes")
    number("--reference", action=argparse.BooleanOptionalAction, default=default.reference,
           help="train a second time, on the PyTorch reference")  # fmt: skip
    number("--out", type=Path, default=Path("metafast-demo"), help="folder for demo.png and demo.json")
    number("--json", type=Path, default=None, help="write the results here instead; must not exist yet")


def at_least(bound: int, most: int | None = None) -> Callable[[str], int]:
    """A parser of whole numbers from `bound` up, to `most` where it is given."""

    def whole(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number") from None
        if value < bound:
            raise argparse.ArgumentTypeError(f"got {value}, expected {bound} or more")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"got {value}, expected {most} or less")
        return value

    return whole


def positive(text: str) -> float:
    """A parser of positive, finite numbers."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text}, expected a positive number")
    return value


# ---------------------------------------------------------------------------------------------- demo


def demo(options: argparse.Namespace) -> int:
    """`metafast demo`: check the options and the places to write, then train, test, write."""
    missing = missing_packages()
    if missing:
        return fail(f"needs {', '.join(missing)}; pip install {' '.join(missing)}")
    problem = check_outputs(options.out, options.json)
    if problem:
        return fail(problem)
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads or threads)
    try:
        return run_demo(options)
    finally:
        torch.set_num_threads(threads)


def run_demo(options: argparse.Namespace) -> int:
    """The demo with its options checked."""
    from metafast.demo import console as consoles
    from metafast.demo import glyphs, job, plot, train
    from metafast.demo.settings import Settings

    settings = Settings(**{name: getattr(options, name) for name in Settings.__dataclass_fields__})
    console, watch = consoles.make_console(), consoles.Stopwatch()
    with job.flushed_subnormals():
        with warnings.catch_warnings(record=True) as caught, console.track("drawing") as at:
            warnings.simplefilter("always")
            data = glyphs.load(at)
        for line in [*(str(w.message) for w in caught), *job.describe_letters(data)]:
            console.say(line)
        try:
            train.check_room(data, settings)
        except ValueError as error:
            return fail(str(error))
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return fail(f"--out {options.out} cannot be made ({error.strerror}); give another folder")
        results = job.run(settings, data, console)
    picture, record = options.out / "demo.png", options.json or options.out / "demo.json"
    plot.save(results, picture)
    results.seconds = watch.seconds
    write_json(results.as_json(), record)
    for line in [*job.summary(results), f"Picture: {picture}", f"Numbers: {record}"]:
        console.say(line)
    return INTERRUPTED if results.interrupted else 0


def missing_packages() -> list[str]:
    """What the demo needs beside torch and is not installed."""
    from importlib.util import find_spec

    needed = {"matplotlib": "matplotlib", "PIL": "pillow", "platformdirs": "platformdirs"}
    return [package for module, package in needed.items() if find_spec(module) is None]


def check_outputs(out: Path, record: Path | None) -> str | None:
    """What is wrong with the places to write to, before an hour's work is lost on it; None if nothing."""
    if os.path.exists(out) and not os.path.isdir(out):  # those of Path raise for a name that is too long
        return f"--out {out} is a file; give a folder, demo.png and demo.json go into it"
    if record is not None and os.path.exists(record):
        return f"--json {record} exists already; give another name, or remove it"
    if record is not None and not os.path.isdir(record.absolute().parent):
        return f"--json {record}: there is no folder {record.absolute().parent}"
    places = {"--out": out.absolute()} | ({"--json": record.absolute().parent} if record is not None else {})
    for option, folder in places.items():
        if (place := closed(folder)) is not None:
            return f"{option}: nothing can be written in {place}; give another place"
    return None


def closed(folder: Path) -> Path | None:
    """What keeps a folder, which may have to be made first, from being written to: the nearest place above that is
    there, if it is no folder or takes no files. None where it does."""
    nearest = next(place for place in (folder, *folder.parents) if os.path.exists(place))
    return None if os.path.isdir(nearest) and os.access(nearest, os.W_OK | os.X_OK) else nearest


def write_json(record: dict[str, Any], path: Path) -> None:
    """Write `record`, readable."""
    path.write_text(json.dumps(record, indent=1) + "\n")


def fail(text: str) -> int:
    """Say what is wrong and return the status for it."""
    print(f"metafast demo: error: {text}", file=sys.stderr)
    return USAGE


# ---------------------------------------------------------------------------------------------- bench


def bench(arguments: Sequence[str]) -> int:
    """`metafast bench ...` is `python -m bench ...` in the checkout; the wheel does not carry the benchmarks."""
    checkout = find_checkout()
    if checkout is None:
        print(
            "metafast bench: error: the benchmarks are in the source checkout, not in the installed package; "
            "clone the repository and run metafast bench in it",
            file=sys.stderr,
        )
        return USAGE
    # In the caller's folder, where the files are that its options name, but with the checkout's modules.
    run = "import runpy, sys; sys.path[0] = sys.argv.pop(1); runpy.run_module('bench', None, '__main__', True)"
    try:
        return subprocess.run([sys.executable, "-c", run, str(checkout), *arguments], check=False).returncode
    except KeyboardInterrupt:
        return INTERRUPTED


def find_checkout() -> Path | None:
    """The checkout that this package was installed from in place, or else the one around the current folder."""
    import metafast

    places = [Path(metafast.__file__).resolve().parent.parent, Path.cwd(), *Path.cwd().parents]
    return next((p for p in places if (p / "bench" / "__main__.py").is_file() and (p / "csrc").is_dir()), None)
