"""`python -m bench [workload ...]`: metafast against its peers; prints tables, writes JSON and a plot.

Compilers need minutes on some workloads: `--prepare` lets them and the float64 reference run beforehand and keeps
what they found, so that the measurement itself is short. The JSON is written after each workload.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench import machine, options, table

if TYPE_CHECKING:
    from bench.harness import Effort

INTERRUPTED = 130  # what a shell reports for a command that Ctrl-C ended


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", help="names, see --list (default: all of the table)")
    parser.add_argument("--peers", nargs="+", help="contenders, see --list (default: all that are installed)")
    parser.add_argument("--json", type=options.writable, metavar="FILE", help="write the results there")
    parser.add_argument("--merge", action="store_true", help="keep what FILE has of other workloads")
    parser.add_argument("--plot", type=options.picture, metavar="PNG", help="draw the ratios")
    parser.add_argument("--quick", action="store_true", help="tiny workloads, few rounds")
    parser.add_argument("--threads", type=options.positive, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--rounds", type=options.positive, help="rounds at most (default 15)")
    parser.add_argument("--budget", type=float, help="seconds a contender may use on a workload (default 20)")
    parser.add_argument("--longest", type=float, help="seconds of a call that is not repeated (default 30)")
    parser.add_argument("--limit", type=float, help="seconds a trial in a process of its own may take (default 300)")
    parser.add_argument("--fresh", action="store_true", default=None, help="trials of all: first call, peak memory")
    parser.add_argument("--prepare", action="store_true", help="trials and references alone, kept for later runs")
    parser.add_argument("--list", action="store_true", help="list workloads and contenders, and end")
    return parser.parse_args(arguments)


def _effort(given: argparse.Namespace) -> Effort:
    from dataclasses import replace

    from bench import harness

    chosen = {name: getattr(given, name) for name in ("rounds", "budget", "longest", "limit", "fresh")}
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
        if record["skipped"] and "not installed" not in record["skipped"]
    ]


def run(given: argparse.Namespace) -> dict:
    """Measure what was asked for: the results as they go into the JSON, where they are after each workload."""
    from bench import harness, peers, workloads
    from metafast.demo.console import make_console

    names = given.workloads or (workloads.QUICK if given.quick else workloads.DEFAULT)
    rows = _chosen(names, workloads.WORKLOADS, "workload")
    usual = peers.QUICK if given.quick else peers.DEFAULT
    contenders = _chosen(given.peers or usual, peers.all_peers(), "--peers")
    console, results = make_console(), {"machine": machine.describe(given.threads), "workloads": {}}
    held = _held(given)
    if not given.prepare:
        _describe(results, given, console.say)
    with console.track("prepare" if given.prepare else "bench") as at:
        for number, w in enumerate(rows.values()):

            def progress(done: int, note: str, number: int = number, name: str = w.name) -> None:
                at(100 * number + done, 100 * len(rows), f"{name}: {note}")

            console.say(w.title)
            if given.prepare:
                harness.prepare(w, contenders, _effort(given), console.say, progress)
                continue
            entry = harness.measure(w, contenders, _effort(given), console.say, progress)
            results["workloads"][w.name] = entry | {"roof": results["roof"]}
            console.say(table.report(results["workloads"][w.name]))
            _write(results, given.json, held)
        at(100 * len(rows), 100 * len(rows), "done")
    return results


def _describe(results: dict, given: argparse.Namespace, say: Callable[[str], None]) -> None:
    """Measure the roof, the cores' round trip, whether subnormals are flushed; say what times here are worth."""
    results["machine"]["flushes_subnormals"] = machine.flushes_everywhere()
    results["machine"]["round_trip"] = trip = machine.round_trip()
    results["roof"] = roof = machine.roof(*((256, 2) if given.quick else (2048, 5)))
    rates = f"{roof['sgemm_gflops']:.0f} GFLOP/s sgemm, {roof['copy_gbs']:.1f} GB/s copy"
    say(f"roof: {rates}; {given.threads} threads; {table.trip(trip)}\n")
    if results["machine"]["load_before"] > 0.5:
        say(f"the machine is busy (load {results['machine']['load_before']}): times mean little\n")


def _held(given: argparse.Namespace) -> dict:
    """On request the workloads that the JSON holds already."""
    if given.json and given.merge and given.json.exists():
        return json.loads(given.json.read_text())["workloads"]
    return {}


def _write(results: dict, file: Path | None, held: dict) -> None:
    """Write the JSON, in one step, with the workloads held from before; nothing where no file is asked for."""
    if file is None:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}")
    part.write_text(json.dumps(results | {"workloads": held | results["workloads"]}, indent=1) + "\n")
    part.replace(file)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if metafast itself failed somewhere, 130 if it was interrupted."""
    given = parse(arguments)
    machine.bind(given.threads)
    machine.settle(given.threads)
    if given.list:
        _list()
        return 0
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what a time limit sends ends trials too
    try:
        results = run(given)
    except KeyboardInterrupt:
        kept = f"the workloads before are in {given.json}" if given.json else "nothing is kept without --json"
        kept = "trials that ended are kept" if given.prepare else kept
        print(f"\npython -m bench: interrupted; {kept}", file=sys.stderr)
        return INTERRUPTED
    if given.plot:
        from bench.plot import draw

        draw(results, given.plot)
    failures = _failures(results)
    for failure in failures:
        print(f"metafast failed on {failure}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
