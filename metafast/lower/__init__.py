"""Lowering: sections of graphs to one native Program (fuse, lay out, plan memory, assemble)."""

from metafast.lower.program import Lowered, lower

__all__ = ["Lowered", "lower"]
