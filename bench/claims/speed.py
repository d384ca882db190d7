"""metafast reaches the ratios that each workload states, against every peer that is installed.

`python -m bench.claims.speed` runs the benchmark's whole table; the goals stand in the rows of
`bench.workloads`.
"""

from __future__ import annotations

import argparse

from bench import machine, table
from bench.__main__ import parse
from bench.__main__ import run as benchmark
from bench.claim import Claim, run


def measure(given: argparse.Namespace) -> list[Claim]:
    """One claim a goal that could be measured here."""
    options = ["--threads", str(given.threads), *(["--quick"] if given.quick else [])]
    machine.bind(given.threads)
    machine.settle(given.threads)
    claims = []
    for entry in benchmark(parse(options))["workloads"].values():
        found = table.measured(entry)
        for kind, (must, _) in entry["goal"].items():
            if kind in found:
                unit = "% of the sgemm roof" if kind == "roof" else f"× {kind}"
                claims.append(Claim(entry["title"], found[kind], must, unit, at_least=True))
    return claims


if __name__ == "__main__":
    run(__doc__, measure)
