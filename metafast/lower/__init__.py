"""Lowering: sections of graphs to one native Program (interleave, fuse, lay out, plan memory, assemble)."""

from metafast.lower.interleave import NotInterleaved, per_task
from metafast.lower.program import NAMES, External, Lowered, Prepared, lower

__all__ = ["NAMES", "External", "Lowered", "NotInterleaved", "Prepared", "lower", "per_task"]
