"""A contender tried in a process of its own: does it finish in time, how long is its first call, how much memory?

A trial guards the main process against compilers that take minutes and can't be interrupted, fills their caches
(`machine.bind`), and is where cold first calls and peak memory are measured. What a peer did is kept on disk, by
everything it depends on; metafast is tried anew each time. `python -m bench.trial WORKLOAD PEER` makes one trial and
prints one JSON line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.peers import Peer
    from bench.workloads import Workload

ROOT = Path(__file__).resolve().parent.parent
ADAPTERS = ("architectures.py", "jax_peers.py", "peers.py")


def child(module: str, *arguments: str, limit: float = 600.0) -> dict:
    """Run `python -m module arguments...` afresh: the JSON of its last line. Raises if it fails or takes longer.

    At the limit the process ends with all that it started: compilers run in processes of their own. It finds bytecode
    where a process before it left some, as an installed package does.
    """
    from bench import machine

    bytecode = {"PYTHONPYCACHEPREFIX": str(machine.cache_folder() / "bytecode"), "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, "-m", module, *arguments]
    pipes: Any = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **bytecode})
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes) as process:
        try:
            output, errors = process.communicate(timeout=limit)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode != 0:
        last = (errors.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{module} {' '.join(arguments)}: ended with {process.returncode}: {last}")
    return json.loads(output.strip().splitlines()[-1])


# ---- outcomes, kept


def kept_file(w: Workload, peer: Peer, threads: int) -> Path:
    """Where the outcome lies: a name for workload, adapters, versions, machine and threads."""
    from bench import machine

    here = machine.describe(threads)
    of_workload = {f.name: repr(getattr(w, f.name)) for f in fields(w) if f.name not in ("goal", "title")}
    sources = [(ROOT / "bench" / name).read_text() for name in ADAPTERS]
    versions = {name: version for name, version in here["versions"].items() if name != "metafast"}
    on = [here[key] for key in ("processor", "python", "threads")]
    digest = hashlib.sha256(json.dumps([of_workload, peer.name, sources, versions, on]).encode())
    return machine.cache_folder() / "trials" / f"{w.name}-{peer.name}-{digest.hexdigest()[:16]}.json"


def kept(w: Workload, peer: Peer, threads: int, limit: float) -> dict | None:
    """The kept outcome; None if there is none, or it ended at a lower limit."""
    file = kept_file(w, peer, threads)
    if peer.family == "metafast" or not file.exists():
        return None
    found = json.loads(file.read_text())
    return None if found.get("limit", limit) < limit else found


def outcome(w: Workload, peer: Peer, threads: int, limit: float) -> dict:
    """`first` and `second` call in seconds, `peak` in bytes, `load` before; or `skipped`, with its `limit` if any."""
    held = kept(w, peer, threads, limit)
    if held is not None:
        return held
    try:
        found = child("bench.trial", w.name, peer.name, "--threads", str(threads), limit=limit)
    except subprocess.TimeoutExpired:
        found = {"skipped": f"not done in {limit:.0f} s", "limit": limit}
    except RuntimeError as error:
        return {"skipped": str(error)}  # not kept: it may have been the machine's fault
    file = kept_file(w, peer, threads)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(found))
    part.replace(file)
    return found


# ---- in the process of the trial


def run(workload: str, peer: str, threads: int) -> dict:
    """Two calls of one contender in this process: seconds, and peak memory above packages and data; or its error."""
    from bench import machine

    machine.bind(threads)
    machine.settle(threads)
    from bench.peers import all_peers
    from bench.workloads import WORKLOADS, make_case

    contender, load = all_peers()[peer], os.getloadavg()[0]
    contender.load()
    case = make_case(WORKLOADS[workload])
    try:
        return measure_calls(lambda: contender.prepare(case)) | {"load": load}
    except (Exception, SystemExit) as error:
        return {"skipped": brief(error)}


def brief(error: BaseException) -> str:
    """Kind and first line of an exception."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:300]


def measure_calls(prepare: Callable[[], Callable[[], object]]) -> dict:
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
