"""Lowering: sections of graphs to one native Program (fuse, lay out, plan memory, assemble)."""

from metafast.lower.program import NAMES, External, Lowered, lower

__all__ = ["NAMES", "External", "Lowered", "lower"]
