"""How a workload is measured: answers first, then warm calls, then rounds of turns.

A sample is the mean of as many calls as fill `sample` seconds, after calls that fill as many and do not count: for some
10 ms after a pause, or after another contender, a core has not reached its pace, and a thread that was woken may
still wait on the core of who woke it. Contenders take turns within a round, and the order rotates from round to
round, so that a drift of the machine hits all alike; before each round it is measured how long a cache line takes to
another core and back, which says of a virtual machine whether its host has moved the cores. A contender gets as many
rounds as fit into `budget` seconds, at least three, which the record says (`samples`); one whose single call takes
longer than `longest` seconds is named and left out.
"""

from __future__ import annotations

import gc
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch

from bench import flops, trial
from bench.answers import Verdict, as_answer, judge, judge_again, reference
from bench.machine import extent, round_trip, spread
from bench.peers import Call, Peer
from bench.workloads import Case, Goal, Workload, make_case

Report = Callable[[str], None]
Progress = Callable[[int, str], None]  # share done (of 100), what is going on

LEAST = 3  # rounds, however slow


@dataclass(frozen=True)
class Effort:
    """How long to measure: rounds, seconds a sample, seconds a contender in all, the longest call that is repeated.

    Before a sample, calls that do not count take as long as it.

    `limit` bounds, in seconds, the trial of a contender in a process of its own; `fresh` asks for such a trial of
    every contender (first call, peak memory), not only of those that compile. `pause` lets spinning thread pools
    fall asleep before another contender starts.
    """

    rounds: int = 15
    sample: float = 0.05
    budget: float = 20.0
    longest: float = 30.0
    limit: float = 300.0
    fresh: bool = False
    pause: float = 0.02

    def rounds_for(self, seconds: float) -> int:
        """Rounds for a contender that needs so many seconds a call: at least 3, at most `rounds`."""
        return max(LEAST, min(self.rounds, math.floor(self.budget / max(seconds, self.sample))))

    def calls_for(self, seconds: float) -> int:
        """Calls a sample."""
        return max(1, math.ceil(self.sample / max(seconds, 1e-6)))


QUICK = Effort(rounds=3, sample=0.005, budget=1.0, pause=0.0)


@dataclass
class Record:
    """What one contender did on one workload. Seconds are of one call; `skipped` says why there are none.

    `fresh` is what a trial in a process of its own found: cold `first` call, `second` call, `peak` memory in bytes.
    """

    peer: str
    family: str
    skipped: str | None = None
    verdict: Verdict | None = None
    notes: list[str] = field(default_factory=list)
    first_call: float | None = None
    fresh: dict | None = None
    seconds: list[float] = field(default_factory=list)

    @property
    def ran(self) -> bool:
        """Whether there are times, which takes a right answer."""
        return bool(self.seconds)

    def as_json(self, work: int) -> dict:
        """The record as plain data, with median, spread and rate."""
        plain = asdict(self)
        if self.ran:
            median, iqr = spread(self.seconds)
            plain |= {
                "median": median,
                "iqr": iqr,
                "samples": len(self.seconds),
                "gflops": work / median / 1e9,
            }
        return plain


@dataclass
class Contender:
    """A peer at work on a case: its record, its call and a rough time of one call."""

    record: Record
    call: Call | None = None
    estimate: float = 0.0


def enter(peer: Peer, w: Workload, effort: Effort) -> Contender:
    """A contender; skipped if it is missing, can't compute the workload, or its trial says so."""
    record = Record(peer.name, peer.family, skipped=peer.missing() or peer.declines(w))
    threads = torch.get_num_threads()
    if record.skipped is not None:
        return Contender(record)
    if peer.compiles or effort.fresh:
        record.fresh = trial.outcome(w, peer, threads, effort.limit)
    else:
        record.fresh = trial.kept(w, peer, threads, effort.limit)
    found = record.fresh or {}
    record.skipped = found.get("skipped") or _too_long(found.get("second", 0.0), effort)
    return Contender(record)


def _too_long(seconds: float, effort: Effort) -> str | None:
    return f"one call takes {seconds:.2g} s, over {effort.longest:g} s" if seconds > effort.longest else None


def _first_call(peer: Peer, contender: Contender, case: Case, answer: tuple) -> None:
    """Prepare and call once; keep the times, the warnings and the verdict on the answer."""
    record = contender.record
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        contender.call = peer.prepare(case)
        middle = time.perf_counter()
        raw = contender.call()
    contender.estimate = time.perf_counter() - middle
    record.first_call = time.perf_counter() - start
    record.notes += sorted(
        {str(w.message).splitlines()[0] for w in caught if "Fallback" in w.category.__name__}
    )
    record.verdict = judge(as_answer(raw), *answer, case.workload.dtype)
    if record.verdict.fault:
        record.verdict = judge_again(record.verdict, lambda copy: peer.prepare(copy)(), case, *answer)
    if record.verdict.fault:
        record.skipped = f"wrong answer: {record.verdict.fault}"


def check(peer: Peer, contender: Contender, case: Case, answer: tuple, effort: Effort) -> None:
    """First call, verdict and a rough time; a contender that fails or is wrong goes no further."""
    try:
        _first_call(peer, contender, case, answer)
        if contender.record.skipped is None:
            contender.estimate = _rough(peer, contender, effort)
            contender.record.skipped = _too_long(contender.estimate, effort)
    except (Exception, SystemExit) as error:
        contender.record.skipped = trial.brief(error)


def _rough(peer: Peer, contender: Contender, effort: Effort) -> float:
    """Seconds of a call. A first one that leaves room for no more than `LEAST` rounds is not repeated to find out."""
    if contender.estimate > effort.budget / LEAST and not (peer.compiles or peer.family == "metafast"):
        return contender.estimate
    return min(_sample(contender.call, 1) for _ in range(1 if contender.estimate > 1.0 else 2))


def _sample(call: Call, calls: int) -> float:
    """Mean seconds of some calls in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def pace(call: Call, seconds: float) -> float:
    """Mean seconds of as many calls in a row as fill so many seconds, at least one."""
    calls, start = 0, time.perf_counter()
    while True:
        call()
        calls += 1
        if (passed := time.perf_counter() - start) >= seconds:
            return passed / calls


def _turn(contender: Contender, effort: Effort) -> None:
    """One sample, after as long of calls that do not count; where a call takes a second, none comes before it."""
    time.sleep(effort.pause)
    estimate = contender.estimate
    seconds = pace(contender.call, effort.sample) if estimate < 1.0 else estimate
    contender.record.seconds.append(_sample(contender.call, effort.calls_for(seconds)))


def take_turns(contenders: Sequence[Contender], effort: Effort, at: Progress = lambda done, note: None) -> list[float]:
    """The rounds: who needs fewer of them drops out early, order rotates. The cores' round trip before each, if any."""
    rounds = {c.record.peer: effort.rounds_for(c.estimate) for c in contenders}
    most = max(rounds.values(), default=0)
    trips = []
    for turn in range(most):
        gc.collect()
        trips.append(round_trip())
        shift = turn % len(contenders)
        for contender in [*contenders[shift:], *contenders[:shift]]:
            if turn < rounds[contender.record.peer]:
                at(50 + 50 * turn // most, f"round {turn + 1}/{most}, {contender.record.peer}")
                _turn(contender, effort)
    return [trip for trip in trips if trip is not None]


def medians_in_turns(calls: Sequence[Call], effort: Effort) -> list[float]:
    """Median seconds of calls that are known to be right, in turns like contenders."""
    contenders = []
    for at, call in enumerate(calls):
        call()
        contenders.append(Contender(Record(str(at), "metafast"), call, _sample(call, 1)))
    take_turns(contenders, effort)
    return [spread(c.record.seconds)[0] for c in contenders]


def measure(
    w: Workload,
    peers: Mapping[str, Peer],
    effort: Effort,
    report: Report = print,
    at: Progress = lambda done, note: None,
) -> dict:
    """Measure one workload: its JSON entry."""
    at(0, "reference answer")
    case = make_case(w)
    answer = reference(case)
    contenders = []
    for number, peer in enumerate(peers.values()):
        at(50 * number // len(peers), f"checking {peer.name}")
        contender = enter(peer, w, effort)
        if contender.record.skipped is None:
            check(peer, contender, case, answer, effort)
        contenders.append(contender)
        report(_line(contender))
    trips = take_turns([c for c in contenders if c.record.skipped is None], effort, at)
    return summary(w, [c.record for c in contenders], answer[1].l2, trips)


def _line(contender: Contender) -> str:
    record = contender.record
    if record.skipped is not None:
        return f"  {record.peer:16} {record.skipped}"
    found = record.verdict.deviation if record.verdict else None
    error = f"rel. L2 {found.l2:.1e}, cosine {found.cosine:.6f}" if found else ""
    return f"  {record.peer:16} right: {error}; first call {first_call(record):.2f} s"


def first_call(record: Record) -> float:
    """Seconds of a first call with nothing compiled yet: the trial's where there was one, else this process's."""
    return record.fresh["first"] if record.fresh else record.first_call or math.nan


def prepare(
    w: Workload, peers: Mapping[str, Peer], effort: Effort, report: Report, at: Progress = lambda done, note: None
) -> None:
    """What a measurement of the workload will find kept: the reference answer, trials, compiled code."""
    at(0, "reference answer")
    reference(make_case(w))
    for number, peer in enumerate(peers.values()):
        at(100 * number // len(peers), f"trial of {peer.name}")
        if peer.family != "metafast":
            record = enter(peer, w, effort).record
            report(f"  {peer.name:16} {record.skipped or _times(record.fresh)}")


def _times(fresh: dict | None) -> str:
    return f"first call {fresh['first']:.2f} s, second {fresh['second']:.3f} s" if fresh else "no trial"


def summary(w: Workload, records: Sequence[Record], reference_l2: float, trips: list[float]) -> dict:
    """The workload's JSON entry: its records, its work, ratios to metafast and what became of its goals.

    `round_trip` has the least, median and most of the cores' round trips in seconds; None where there is one core.
    """
    work = flops.count(w)
    entries = {r.peer: r.as_json(work) for r in records}
    return {
        "title": w.title,
        "tasks": w.tasks,
        "steps": w.steps,
        "order": w.order,
        "gflop": work / 1e9,
        "reference_l2": reference_l2,
        "round_trip": extent(trips) if trips else None,
        "peers": entries,
        "ratios": ratios(entries),
        "goal": {kind: list(pair) for kind, pair in asdict(w.goal).items() if pair}
        if w.goal != Goal()
        else {},
    }


def ratios(entries: Mapping[str, dict]) -> dict[str, dict]:
    """Fastest PyTorch peer, eager loop and fastest JAX form against metafast: name and ratio of medians."""
    ours = next((e["median"] for e in entries.values() if e["family"] == "metafast" and "median" in e), None)
    if ours is None:
        return {}
    timed = {name: e for name, e in entries.items() if "median" in e}
    groups = {
        "pytorch": [name for name, e in timed.items() if e["family"] == "pytorch"],
        "eager": [name for name in timed if name == "eager"],
        "jax": [name for name, e in timed.items() if e["family"] == "jax"],
    }
    fastest = {kind: min(names, key=lambda n: timed[n]["median"]) for kind, names in groups.items() if names}
    return {kind: {"peer": name, "ratio": timed[name]["median"] / ours} for kind, name in fastest.items()}
