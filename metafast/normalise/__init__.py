"""Normalise: a Trace of aten calls becomes a Graph of metafast's own ops.

`rewrite` walks the calls and keeps, for each tensor, what it holds now: in-place writes and writes through views become
values. `table` is the record of rules; each family of aten ops has its module of them.
"""

from metafast.normalise import contract, losses, maxima, pointwise, pool, shape, statistics
from metafast.normalise.rewrite import normalise
from metafast.normalise.table import RULES

__all__ = ["RULES", "contract", "losses", "maxima", "normalise", "pointwise", "pool", "shape", "statistics"]
