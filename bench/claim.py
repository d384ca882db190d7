"""What the scripts in `bench.claims` have in common: a sentence, a measured number, a limit.

Each script prints one line a claim; with `--check` it ends with 1 if a limit was missed, with `--json FILE`
it writes the numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from bench import machine, options


@dataclass(frozen=True)
class Claim:
    """A sentence of the README, what was measured, and the limit: at most, or at least where `at_least`."""

    sentence: str
    measured: float
    limit: float
    unit: str
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """Whether the measured number is within the limit; NaN is not."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def line(self) -> str:
        """The claim in a line."""
        bound = "at least" if self.at_least else "at most"
        state = "ok" if self.holds else "MISSED"
        return f"{state:6} {self.sentence}: {self.measured:.3g} {self.unit} ({bound} {self.limit:g})"


def parser(doc: str) -> argparse.ArgumentParser:
    """The options that every script has."""
    made = argparse.ArgumentParser(description=doc.splitlines()[0])
    made.add_argument("--check", action="store_true", help="end with 1 if a limit is missed")
    made.add_argument("--json", type=options.writable, metavar="FILE", help="write claims and machine there")
    made.add_argument("--quick", action="store_true", help="small sizes: does the script still run?")
    made.add_argument("--threads", type=options.positive, default=2)
    made.add_argument("--child", help=argparse.SUPPRESS)
    return made


def conclude(given: argparse.Namespace, claims: Sequence[Claim]) -> int:
    """Print the claims and write them where asked for; the exit status."""
    for claim in claims:
        print(claim.line())
    if given.json:
        held = {
            "machine": machine.describe(given.threads),
            "claims": [asdict(c) | {"holds": c.holds} for c in claims],
        }
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(held, indent=1) + "\n")
    return 1 if given.check and not all(c.holds for c in claims) else 0


def run(
    doc: str,
    measure: Callable[[argparse.Namespace], list[Claim]],
    child: Callable[[argparse.Namespace], dict] | None = None,
) -> None:
    """The main function of a script: `measure`, or `child` in a process that `in_fresh` started."""
    given = parser(doc).parse_args()
    if given.child is not None and child is not None:
        print(json.dumps(child(given)))
        return
    sys.exit(conclude(given, measure(given)))


def in_fresh(module: str, job: str, given: argparse.Namespace) -> dict:
    """What the script's `child` returns for the job, in a new process with the same options."""
    from bench import trial

    options = ["--threads", str(given.threads), *(["--quick"] if given.quick else [])]
    return trial.child(module, "--child", job, *options)
