"""What ops exist: one table, one row an op (`table.Op`), one module a family."""

from metafast.ops import contract, losses, pointwise, pool, shape, statistics
from metafast.ops.table import TABLE, Op, add_maybe, numel, scale, spread, sum_to

__all__ = ["TABLE", "Op", "add_maybe", "contract", "losses", "numel", "pointwise", "pool", "scale", "shape"]
__all__ += ["spread", "statistics", "sum_to"]
