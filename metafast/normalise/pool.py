"""Rules for pooling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from metafast.graph import Value
from metafast.normalise.contract import pair
from metafast.normalise.table import Context, rule
from metafast.ops.winners import max_pool


def _as_batch(c: Context, x: Any, pool: Callable[[Value], Sequence[Value]]) -> list[Value]:
    """Pool (C, H, W) as a batch of one."""
    v = c.real(x)
    if len(v.shape) == 4:
        return list(pool(v))
    outs = pool(c.reshape(v, (1, *v.shape)))
    return [c.reshape(o, o.shape[1:]) for o in outs]


@rule("max_pool2d_with_indices", "max_pool2d")
def _max_pool(
    c: Context,
    x: Any,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> list[Value]:
    attrs: dict[str, Any] = {
        "kernel": pair(kernel_size),
        "stride": pair(stride or kernel_size),
        "padding": pair(padding),
        "dilation": pair(dilation),
        "ceil": bool(ceil_mode),
    }
    return _as_batch(c, x, lambda v: max_pool(c.b, v, **attrs))


@rule("avg_pool2d")
def _avg_pool(
    c: Context,
    x: Any,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Value:
    attrs = {
        "kernel": pair(kernel_size),
        "stride": pair(stride or kernel_size),
        "padding": pair(padding),
        "ceil": bool(ceil_mode),
        "count_include_pad": bool(count_include_pad),
        "divisor": int(divisor_override or 0),
    }
    return _as_batch(c, x, lambda v: c.b.ops("avg_pool", v, **attrs))[0]


def _windows(c: Context, x: Any, output_size: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and steps of the windows: equal parts of the picture, each with one pixel of the next where one is left."""
    size = c.shape(x)[-2:]
    parts = [divmod(n, o) if 0 < o <= n else (0, 2) for n, o in zip(size, output_size, strict=True)]
    if any(left > 1 for _, left in parts):
        raise c.refuse(f"adaptive pooling of {size} to {tuple(output_size)} needs windows of unequal size")
    return tuple(step + left for step, left in parts), tuple(step for step, _ in parts)


@rule("_adaptive_avg_pool2d", "adaptive_avg_pool2d")
def _adaptive_avg(c: Context, x: Any, output_size: Sequence[int]) -> Value:
    if tuple(output_size) == (1, 1):
        rank = len(c.shape(x))
        return c.mean(x, (rank - 2, rank - 1), keepdim=True)
    return _avg_pool(c, x, *_windows(c, x, output_size))


@rule("adaptive_max_pool2d")
def _adaptive_max(c: Context, x: Any, output_size: Sequence[int]) -> list[Value]:
    return _max_pool(c, x, *_windows(c, x, output_size))
