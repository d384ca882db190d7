"""A contender tried once in a process of its own: does it finish in time, and in how much memory?

`attempt` guards the main process against compilers that take minutes and can't be interrupted; `python -m
bench.trial WORKLOAD PEER` is what it starts, and prints one JSON line with first and second call in seconds
and peak memory above the data in bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def child(module: str, *arguments: str, limit: float = 600.0) -> dict:
    """Run `python -m module arguments...` afresh: the JSON of its last line. Raises if it fails."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{module} {' '.join(arguments)}: ended with {done.returncode}: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def attempt(workload: str, peer: str, limit: float) -> str | None:
    """Why the peer can't be run on the workload here, found by running it elsewhere first; None if it can."""
    try:
        child("bench.trial", workload, peer, limit=limit)
    except subprocess.TimeoutExpired:
        return f"not done in {limit:.0f} s"
    except RuntimeError as error:
        return str(error)
    return None


def run(workload: str, peer: str, threads: int) -> dict:
    """Two calls of one contender in this process: seconds, and peak memory above the data."""
    from bench import machine

    machine.bind(threads)
    machine.settle(threads)
    from bench.peers import all_peers
    from bench.workloads import WORKLOADS, make_case

    case = make_case(WORKLOADS[workload])
    return measure_calls(lambda: all_peers()[peer].prepare(case))


def measure_calls(prepare) -> dict:
    """Seconds of a first call, preparation included, and of a second; peak bytes above those before."""
    import time

    from bench import machine

    machine.forget_peak()
    before, start = machine.memory_now(), time.perf_counter()
    call = prepare()
    call()
    middle = time.perf_counter()
    call()
    return {
        "first": middle - start,
        "second": time.perf_counter() - middle,
        "peak": machine.memory_peak() - before,
    }


def main() -> None:
    """Parse `WORKLOAD PEER [--threads N]`, run, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workload")
    parser.add_argument("peer")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    print(json.dumps(run(given.workload, given.peer, given.threads)))


if __name__ == "__main__":
    main()
