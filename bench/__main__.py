"""`python -m bench [workload ...]`: metafast against its peers; prints tables, writes JSON and a plot."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench import machine

if TYPE_CHECKING:
    from bench.harness import Effort


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("workloads", nargs="*", help="names, see --list (default: all of the table)")
    parser.add_argument("--peers", nargs="+", help="contenders, see --list (default: all that are installed)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--merge", action="store_true", help="keep what FILE has of other workloads")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the ratios")
    parser.add_argument("--quick", action="store_true", help="tiny workloads, few rounds")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=int, help="rounds at most (default 15)")
    parser.add_argument("--budget", type=float, help="seconds a contender may use on a workload (default 20)")
    parser.add_argument("--hard", action="store_true", help="torch.compile and JAX on conv nets too")
    parser.add_argument("--limit", type=float, help="seconds such a trial may take (default 300)")
    parser.add_argument("--memory", action="store_true", help="peak memory in fresh processes too")
    parser.add_argument("--list", action="store_true", help="list workloads and contenders, and end")
    return parser.parse_args(arguments)


def _effort(given: argparse.Namespace) -> Effort:
    from dataclasses import replace

    from bench import harness

    chosen = {name: getattr(given, name) for name in ("rounds", "budget", "limit")}
    named = {name: value for name, value in chosen.items() if value is not None}
    return replace(harness.QUICK if given.quick else harness.Effort(), **named)


def _chosen(names: Sequence[str], known: dict, kind: str) -> dict:
    """The entries of that name; an unknown name ends the program with the known ones."""
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"{kind}: got {', '.join(unknown)}; expected one of: {', '.join(known)}")
    return {name: known[name] for name in names}


def _list() -> None:
    from bench.peers import all_peers
    from bench.workloads import WORKLOADS

    for name, w in WORKLOADS.items():
        print(f"{name:22} {w.title}")
    print()
    for name, peer in all_peers().items():
        print(f"{name:22} {peer.missing() or 'installed'}")


def _fresh(results: dict, threads: int) -> None:
    """Add first call and peak memory, measured in fresh processes, to every contender that ran."""
    from bench import trial

    for workload, entry in results["workloads"].items():
        for peer, record in entry["peers"].items():
            if "median" in record:
                record["fresh"] = trial.child("bench.trial", workload, peer, "--threads", str(threads))


def _failures(results: dict) -> list[str]:
    """Workloads on which metafast was there and did not get timed: wrong answers and exceptions."""
    ours = [
        (name, record)
        for name, entry in results["workloads"].items()
        for record in entry["peers"].values()
        if record["family"] == "metafast"
    ]
    return [
        f"{name}: {record['skipped']}"
        for name, record in ours
        if record["skipped"] and not record["skipped"].endswith("not installed")
    ]


def run(given: argparse.Namespace) -> dict:
    """Measure what was asked for: the results as they go into the JSON."""
    from bench import harness, peers, table, workloads

    names = given.workloads or (workloads.QUICK if given.quick else workloads.DEFAULT)
    rows = _chosen(names, workloads.WORKLOADS, "workload")
    usual = peers.QUICK if given.quick else peers.DEFAULT
    contenders = _chosen(given.peers or usual, peers.all_peers(), "--peers")
    effort = _effort(given)
    roof = machine.roof(*((256, 2) if given.quick else (2048, 5)))
    results: dict = {"machine": machine.describe(given.threads), "workloads": {}}
    results["machine"]["flushes_subnormals"] = machine.flushes_everywhere()
    rates = f"{roof['sgemm_gflops']:.0f} GFLOP/s sgemm, {roof['copy_gbs']:.1f} GB/s copy"
    print(f"roof: {rates}; {given.threads} threads\n")
    if results["machine"]["load_before"] > 0.5:
        print(f"the machine is busy (load {results['machine']['load_before']}): times mean little\n")
    for name, w in rows.items():
        print(w.title, flush=True)
        entry = harness.measure(w, contenders, effort, given.hard) | {"roof": roof}
        results["workloads"][name] = entry
        print(table.report(entry), flush=True)
    return results


def _write(results: dict, file: Path, merge: bool) -> None:
    """Write JSON, on request over the workloads that the file holds already."""
    if merge and file.exists():
        held = json.loads(file.read_text())
        results["workloads"] = {**held["workloads"], **results["workloads"]}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if metafast itself failed somewhere."""
    given = parse(arguments)
    machine.bind(given.threads)
    machine.settle(given.threads)
    if given.list:
        _list()
        return 0
    results = run(given)
    if given.memory:
        _fresh(results, given.threads)
    if given.json:
        _write(results, given.json, given.merge)
    if given.plot:
        from bench.plot import draw

        draw(results, given.plot)
    failures = _failures(results)
    for failure in failures:
        print(f"metafast failed on {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
