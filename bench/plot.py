"""A picture of the ratios, a bar a peer: `python -m bench.plot RESULTS.json OUT.png`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def _bars(axes: Any, results: Mapping) -> None:
    """Horizontal bars from the top, workloads apart by a gap."""
    place, ticks, shown = 0.0, [], set()
    for entry in results["workloads"].values():
        found = ratios(entry)
        if not found:
            continue
        start = place
        for name, ratio in found.items():
            label = None if name in shown else name
            axes.barh(-place, ratio, height=0.9, color=COLOURS.get(name, "#888888"), label=label)
            axes.text(ratio * 1.05, -place, f"{ratio:.3g}×", va="center", fontsize=7)
            shown.add(name)
            place += 1
        ticks.append((-(start + place - 1) / 2, entry["title"].replace(", ", "\n", 1)))
        place += 1
    axes.set_yticks([at for at, _ in ticks], [title for _, title in ticks], fontsize=7)


def draw(results: Mapping, file: Path) -> None:
    """Write the picture; axis in powers of ten, metafast at 1."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    count = sum(len(ratios(entry)) + 1 for entry in results["workloads"].values())
    figure, axes = pyplot.subplots(figsize=(9, max(2.0, 0.22 * count + 1)), layout="constrained")
    axes.set_xscale("log")
    _bars(axes, results)
    axes.axvline(1, color="black", linewidth=1)
    axes.margins(x=0.12)
    here = results["machine"]
    axes.set_xlabel(
        f"time of one meta-gradient over metafast's (threads: {here['threads']}, {here['processor']})"
    )
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7, loc="best")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def main() -> None:
    """Draw a JSON file."""
    parser = argparse.ArgumentParser(prog="python -m bench.plot", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    given = parser.parse_args()
    draw(json.loads(given.results.read_text()), given.picture)


if __name__ == "__main__":
    main()
