"""Rules for the greatest and the least along dims, and for where they are.

Of equal ones `amax` and `max()` share the cotangent evenly; `max(dim)` and `argmax` choose the first, as PyTorch does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from metafast.graph import Value
from metafast.normalise.table import Context, rule
from metafast.normalise.views import Stop


def _greatest(c: Context, x: Any, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> Value:
    over = c.dims(x, dim)
    return c.keep(c("amax", x, dims=over), x, over, keepdim)


def _first(c: Context, x: Any, dim: int) -> Value:
    """1 at the first maximum along a dim, or at the first NaN where there is one."""
    greatest = Stop().get(c.b, _greatest(c, x, dim, keepdim=True))
    hot = c("where", c("ne", greatest, greatest), c("ne", x, x), c("eq", x, greatest))
    return c("mul", hot, c("eq", c("cumsum", hot, dim=dim % len(c.shape(x)), reverse=False), 1.0))


def _along(shape: Sequence[int], dim: int) -> torch.Tensor:
    """The places along a dim, laid out so as to broadcast."""
    d = dim % len(shape)
    return torch.arange(shape[d], dtype=torch.float64).reshape([-1] + [1] * (len(shape) - 1 - d))


def _max_at(c: Context, x: Any, dim: int, keepdim: bool = False) -> tuple[Value, Value]:
    v = c.real(x)
    if not v.shape:
        return v, c.real(0.0)
    first = _first(c, v, dim)
    value = c.total(c("where", first, v, 0.0), dim, keepdim)
    return value, c.total(c("mul", first, _along(v.shape, dim)), dim, keepdim)


def _argmax(c: Context, x: Any, dim: int | None = None, keepdim: bool = False) -> Value:
    v = c.real(x) if dim is not None else c.reshape(c.real(x), (math.prod(c.shape(x)),))
    return c.reshape(_max_at(c, v, 0 if dim is None else dim)[1], c.out[0].shape)


def _enter(names: str, greatest: Callable[..., Any]) -> None:
    """A rule for maxima, and the one for minima: the same of the negative, whose first result is a value or a place."""
    ours, theirs = names.split()
    rule(ours)(greatest)

    @rule(theirs)
    def least(c: Context, x: Any, *args: Any, **kwargs: Any) -> Any:
        made = greatest(c, c("neg", x), *args, **kwargs)
        if isinstance(made, tuple):
            return c("neg", made[0]), made[1]
        return made if ours == "argmax" else c("neg", made)


_enter("amax amin", _greatest)
_enter("max min", _greatest)
_enter("max.dim min.dim", _max_at)
_enter("argmax argmin", _argmax)


@rule("any")
def _any(c: Context, x: Any, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> Value:
    return _greatest(c, c("ne", x, 0.0), dim, keepdim)


@rule("all")
def _all(c: Context, x: Any, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> Value:
    return c("sub", 1.0, _greatest(c, c("eq", x, 0.0), dim, keepdim))
