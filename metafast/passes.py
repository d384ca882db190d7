"""The passes that a program can do without, by name, so that each can be left out.

None of them changes what is computed; each saves time, memory or both. With `METAFAST_WITHOUT=clusters,winograd` in the
environment, or inside `with without("clusters"):`, plans are made without those, and what is wrong with one pass only
shows itself. The set is process-wide and part of what a plan is keyed by, so that no program outlives it. A pass asks
`enabled` at the one place where it is applied. What no program runs without (the identities of the op table, spelling
out what has no kernel, views as strides) is not listed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from metafast.errors import InputError, message

__all__ = ["PASSES", "enabled", "left_out", "without"]

PASSES = {
    # in the graphs
    "winners": "what is done to images and needed at a pool's winners alone is done at the winners",
    "hoist": "what depends on neither φ nor the step is computed once a task, in the prologue",
    "factor": "a 0-dim factor of all tangents multiplies what they lead to, not them",
    "straight": "the adjoint of a parameter that every step hands on as it is, is added up where it is made",
    "thin": "a few steps are one section, where matrices that are sums of thin products then need not be made",
    "keep": "a step keeps products that its way back reads",
    "lanes": "small nets do a vector's worth of tasks at once, one in each lane",
    # in the units of a section
    "spell": "outer products and adjoints of normalisations are spelled in sums and pointwise ops",
    "clusters": "pointwise ops of one shape become one instruction",
    "lazy": "a cheap function of one value, or of one large value, is computed again by each cluster that reads it",
    "reductions": "a cluster adds up what it makes",
    "parts": "a cluster adds up large arrays part by part, which threads share",
    "sums": "products that are added write into one buffer",
    "pairs": "two products that are added are one instruction",
    "bias": "a product or convolution starts from its bias",
    "onto": "what a product is added to, or taken from, takes it up where it is made",
    # in the instructions
    "direct": "what makes an output of the section writes it, or adds it, where it belongs",
    "layout": "a cluster writes in the layout of what it reads",
    "copies": "one copy into another layout serves all that need it",
    "masks": "a choice by the sign of a value reads the value, and no mask is made",
    "winograd": "3×3 convolutions in float32 take fewer products, where that pays",
    "code": "a cluster becomes machine code, which keeps everything between its inputs and outputs in registers",
    "bundle": "alike instructions over many parameters become one",
    "chunks": "what follows each other over many images does a few of them at a time, which stay in cache",
    "inplace": "arrays are written over those that are read there for the last time",
    "reuse": "arrays that are not alive at once share memory",
}


def _known(names: tuple[str, ...], place: str) -> frozenset[str]:
    if unknown := [name for name in names if name not in PASSES]:
        raise InputError(message(place, ", ".join(unknown), "names of passes", f"there are {', '.join(PASSES)}"))
    return frozenset(names)


_left_out = _known(
    tuple(name for part in os.environ.get("METAFAST_WITHOUT", "").split(",") if (name := part.strip())),
    "METAFAST_WITHOUT",
)


def left_out() -> frozenset[str]:
    """The passes that are left out at present."""
    return _left_out


def enabled(name: str) -> bool:
    """Whether plans that are made now take this pass."""
    if name not in PASSES:
        raise KeyError(name)
    return name not in _left_out


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Leave out these passes too, in the whole process, until the block ends.

    **Raises** `InputError` for a name that is none of `PASSES`.
    """
    global _left_out
    before = _left_out
    _left_out = before | _known(names, "passes.without")
    try:
        yield
    finally:
        _left_out = before
