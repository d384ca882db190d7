"""A picture of the ratios, a line a workload and a dot a peer: `python -m bench.plot RESULTS.json OUT.png`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import options
from bench.table import times

COLOURS = {
    "eager": "#4c72b0",
    "vmap": "#55a868",
    "compile": "#c44e52",
    "learn2learn": "#8172b3",
    "higher": "#937860",
    "torchopt": "#64b5cd",
    "jax-vmap": "#da8bc3",
    "jax-scan": "#ccb974",
}


def ratios(entry: Mapping) -> dict[str, float]:
    """Each timed peer's median over metafast's; empty where metafast was not timed."""
    ours = next(
        (r["median"] for r in entry["peers"].values() if r["family"] == "metafast" and "median" in r), None
    )
    if ours is None:
        return {}
    timed = {name: r for name, r in entry["peers"].items() if "median" in r and r["family"] != "metafast"}
    return {name: r["median"] / ours for name, r in timed.items()}


def _dots(axes: Any, entries: Mapping[str, Mapping[str, float]]) -> None:
    """A line a workload from the top; beside the dot nearest to metafast its ratio."""
    for place, found in enumerate(entries.values()):
        axes.plot([1, max(found.values(), default=1)], [place, place], color="#dddddd", zorder=0)
        for name, ratio in found.items():
            axes.plot(ratio, place, "o", color=COLOURS.get(name, "#888888"), markersize=6)
        if found:
            nearest = min(found.values())
            axes.annotate(times(nearest), (nearest, place), (0, 5), textcoords="offset points", ha="center", fontsize=7)
    axes.set_yticks(range(len(entries)), entries, fontsize=7)
    axes.set_ylim(len(entries) - 0.4, -0.8)


def draw(results: Mapping, file: Path) -> None:
    """Write the picture; axis in powers of ten, metafast at 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    entries = {entry["title"]: ratios(entry) for entry in results["workloads"].values()}
    entries = {title: found for title, found in entries.items() if found}
    figure, axes = pyplot.subplots(figsize=(10, 0.32 * len(entries) + 1.4), layout="constrained")
    axes.set_xscale("log")
    _dots(axes, entries)
    axes.axvline(1, color="black", linewidth=1)
    here = results["machine"]
    axes.set_xlabel(
        f"time of one meta-gradient over metafast's (threads: {here['threads']}, {here['processor']})", fontsize=8
    )
    timed = [name for name in COLOURS if any(name in found for found in entries.values())]
    dots = [axes.plot([], [], "o", color=COLOURS[name], label=name)[0] for name in timed]
    if dots:
        figure.legend(handles=dots, loc="outside upper center", ncols=len(dots), fontsize=7, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Draw a JSON file."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=options.picture)
    given = parser.parse_args()
    draw(json.loads(given.results.read_text()), given.picture)


if __name__ == "__main__":
    main()
