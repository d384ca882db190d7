"""Tables of results: on the terminal after each workload, and in the README between two markers.

`python -m bench.table RESULTS.json [README.md]` prints the README's table, or puts it into the file.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
FEW = 5  # samples under which a time is marked
HEAD = (
    "workload",
    "metafast",
    "fastest PyTorch peer",
    "eager loop",
    "JAX",
    "of the sgemm roof",
    "printed by",
)


def duration(seconds: float) -> str:
    """Three digits and a unit: 0.000412 → '412 µs'."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 1e-9:.0f} ns"


def times(ratio: float) -> str:
    """A ratio with as many digits as it deserves: '0.08×', '3.4×', '180×'."""
    if ratio < 0.95:
        return f"{ratio:.2g}×"
    return f"{ratio:.0f}×" if ratio >= 20 else f"{ratio:.1f}×"


def percent(share: float) -> str:
    """A percentage without exponents: '172 %', '33 %', '0.4 %'."""
    return f"{share:.0f} %" if share >= 9.5 else f"{share:.1f} %"


def mebibytes(size: float) -> str:
    """Bytes in MiB: '512 MiB', '0.3 MiB'."""
    return f"{size / 2**20:.0f} MiB" if size >= 9.5 * 2**20 else f"{size / 2**20:.1f} MiB"


def trip(seconds: float | Mapping | None) -> str:
    """The cores' round trip, or the median, least and most of some, in words."""
    if seconds is None:
        return "no round trip between cores"
    if isinstance(seconds, Mapping):
        ends = f" ({duration(seconds['least'])} to {duration(seconds['most'])})"
        return f"a cache line to another core and back {duration(seconds['median'])}{ends}"
    return f"a cache line to another core and back {duration(seconds)}"


def report(entry: Mapping) -> str:
    """One workload for the terminal: a line a contender, the goals, then the cores' round trip."""
    lines = [*(_line(entry, name) for name in entry["peers"]), *goals(entry)]
    return "\n".join([*lines, f"  {trip(entry['round_trip'])}", ""])


def _line(entry: Mapping, name: str) -> str:
    record, ours = entry["peers"][name], _ours(entry)
    if "median" not in record:
        return f"  {name:16} {'–':>10}   {record['skipped']}"
    ratio = times(record["median"] / ours["median"]) if ours else ""
    iqr = 100 * record["iqr"] / record["median"]
    roof = 100 * record["gflops"] / entry["roof"]["sgemm_gflops"]
    rate = f"{record['gflops']:8.2f} GFLOP/s {roof:4.0f} %"
    time = f"{duration(record['median']):>10}  ± {iqr:4.1f} %  n={record['samples']:<3}"
    notes = [f"    note: {note}" for note in record["notes"]]
    return "\n".join([f"  {name:16} {time} {ratio:>7}  {rate}{_fresh(record)}", *notes])


def _fresh(record: Mapping) -> str:
    """First call and peak memory of a process of its own, where there was one."""
    found = record.get("fresh")
    return f"  first {duration(found['first'])}, peak {mebibytes(found['peak'])}" if found else ""


def _ours(entry: Mapping) -> Mapping | None:
    """metafast's record, if it was timed."""
    found = [r for r in entry["peers"].values() if r["family"] == "metafast" and "median" in r]
    return found[0] if found else None


def measured(entry: Mapping) -> dict[str, float]:
    """What the goals speak of: ratios by family and percent of the roof."""
    ours = _ours(entry)
    if ours is None:
        return {}
    found = {kind: ratio["ratio"] for kind, ratio in entry["ratios"].items()}
    return found | {"roof": 100 * ours["gflops"] / entry["roof"]["sgemm_gflops"]}


def goals(entry: Mapping) -> list[str]:
    """A line a goal: what must be, what was aimed at, what was measured."""
    found = measured(entry)
    lines = []
    for kind, (must, aim) in entry["goal"].items():
        if kind in found:
            sign = " %" if kind == "roof" else "×"
            state = "aim reached" if found[kind] >= aim else "reached" if found[kind] >= must else "MISSED"
            lines.append(
                f"  goal {kind:8} must {must:g}{sign}, aim {aim:g}{sign}: {found[kind]:.1f}{sign} {state}"
            )
    return lines


def _versus(entry: Mapping, kind: str, named: bool) -> str:
    ratio = entry["ratios"].get(kind)
    if ratio is None:
        return "–"
    record = entry["peers"][ratio["peer"]]
    time = duration(record["median"]) + (f", {record['samples']} runs" if record["samples"] < FEW else "")
    return f"**{times(ratio['ratio'])}** ({ratio['peer'] + ', ' if named else ''}{time})"


def row(name: str, entry: Mapping) -> list[str]:
    """The README's row of one workload."""
    ours = _ours(entry)
    if ours is None:
        return [entry["title"], "–", "–", "–", "–", "–", f"`python -m bench {name}`"]
    roof = measured(entry)["roof"]
    return [
        entry["title"],
        duration(ours["median"]),
        _versus(entry, "pytorch", named=True),
        _versus(entry, "eager", named=False),
        _versus(entry, "jax", named=True),
        f"{percent(roof)} ({ours['gflops']:.3g} GFLOP/s)",
        f"`python -m bench {name}`",
    ]


def _trips(results: Mapping) -> str:
    """Between what the rows' median round trips of a cache line lay, of those that have one."""
    found = [entry["round_trip"]["median"] for entry in results["workloads"].values() if entry.get("round_trip")]
    if not found:
        return ""
    return f" A cache line to another core and back: {duration(min(found))} to {duration(max(found))}, median of a row."


def untimed(results: Mapping) -> list[str]:
    """A line a reason for which peers have no time: who, why, and on which workloads."""
    where: dict[tuple[str, str], list[str]] = {}
    for name, entry in results["workloads"].items():
        for peer, record in entry["peers"].items():
            if "median" not in record:
                where.setdefault((peer, record["skipped"]), []).append(name)
    lines = []
    for (peer, reason), names in where.items():
        on = "all workloads" if len(names) == len(results["workloads"]) else ", ".join(names)
        lines.append(f"- {peer} ({on}): {reason.split(':')[0] if 'not installed' in reason else reason}")
    return lines


def markdown(results: Mapping) -> str:
    """The README's table, a line on the machine above it and below it who was not timed."""
    here = results["machine"]
    versions = ", ".join(
        f"{name} {version}" for name, version in here["versions"].items() if name != "metafast"
    )
    where = f"threads: {here['threads']}, on {here['processor']} ({', '.join(here['vector_sets'])})"
    lead = (
        "One meta-gradient, median; in brackets the peer's time. Operations are counted as direct algorithms. "
        f"{where}, Python {here['python']}, {versions}; subnormals flushed for all.{_trips(results)}"
    )
    rows = [row(name, entry) for name, entry in results["workloads"].items()]
    lines = [f"| {' | '.join(cells)} |" for cells in (HEAD, ["---"] * len(HEAD), *rows)]
    skipped = untimed(results)
    return "\n".join([lead, "", *lines, *(["", "Not timed:", "", *skipped] if skipped else [])])


def replace_between(text: str, table: str) -> str:
    """`text` with the table between the markers; text without them raises."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(
            f"document: got no one pair of markers, expected {BEGIN} once and {END} once after it"
        )
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> None:
    """Print the table, or put it into a file."""
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("document", type=Path, nargs="?")
    given = parser.parse_args()
    table = markdown(json.loads(given.results.read_text()))
    if given.document is None:
        print(table)
    else:
        given.document.write_text(replace_between(given.document.read_text(), table))


if __name__ == "__main__":
    main()
