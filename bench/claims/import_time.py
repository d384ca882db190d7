"""Importing metafast after torch takes at most 50 ms."""

from __future__ import annotations

import argparse
import statistics
import time

from bench.claim import Claim, in_fresh, run


def child(given: argparse.Namespace) -> dict:
    """Seconds of `import metafast` with torch imported."""
    import torch  # noqa: F401

    start = time.perf_counter()
    import metafast  # noqa: F401

    return {"seconds": time.perf_counter() - start}


def measure(given: argparse.Namespace) -> list[Claim]:
    """Median over fresh processes, the first of which warms the disk."""
    found = [
        in_fresh("bench.claims.import_time", "import", given)["seconds"]
        for _ in range(3 if given.quick else 8)
    ]
    return [Claim("import metafast after import torch", 1e3 * statistics.median(found[1:]), 50, "ms")]


if __name__ == "__main__":
    run(__doc__, measure, child)
