"""Rules for normalisation by mean and variance: one core, `standardize`, over different dims."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from metafast.graph import Value
from metafast.normalise.table import Context, rule
from metafast.ops import numel

Normalised = tuple[Value, "Value | None", "Value | None"]


def _affine(c: Context, x: Value, weight: Any, bias: Any, shape: Sequence[int]) -> Value:
    """x·weight + bias, both laid out as `shape`."""
    if weight is not None:
        x = c("mul", x, c.reshape(weight, shape))
    return x if bias is None else c("add", x, c.reshape(bias, shape))


def _batch_norm(
    c: Context, x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, eps: float
) -> Normalised:
    """Over all dims but the channels'; with running statistics where not in training mode."""
    shape = c.shape(x)
    channels = (1, shape[1], *(1 for _ in shape[2:]))
    if not training:
        if mean is None or var is None:
            raise c.refuse("batch_norm in evaluation mode without running statistics has no native form")
        rstd = c("rsqrt", c("add", var, eps))
        centred = c("mul", c("sub", x, c.reshape(mean, channels)), c.reshape(rstd, channels))
        return _affine(c, centred, weight, bias, channels), None, None
    dims = (0, *range(2, len(shape)))
    xhat, rstd, batch_mean, batch_var = c.b.ops("standardize", c.real(x), dims=dims, eps=float(eps))
    c.stats[c.position] = (batch_mean, batch_var)
    return _affine(c, xhat, weight, bias, channels), batch_mean, rstd


@rule("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_native_batch_norm_legit.default")
def _with_running(
    c: Context, x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, momentum: float, eps: float
) -> Normalised:
    return _batch_norm(c, x, weight, bias, mean, var, training, eps)


@rule("_native_batch_norm_legit.no_stats")
def _without_running(
    c: Context, x: Any, weight: Any, bias: Any, training: bool, momentum: float, eps: float
) -> Normalised:
    return _batch_norm(c, x, weight, bias, None, None, True, eps)


@rule("_native_batch_norm_legit_no_training", "_batch_norm_no_update")
def _evaluation(
    c: Context, x: Any, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float
) -> Normalised:
    return _batch_norm(c, x, weight, bias, mean, var, False, eps)


@rule("_batch_norm_with_update")
def _update(
    c: Context, x: Any, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float
) -> Normalised:
    return _batch_norm(c, x, weight, bias, mean, var, True, eps)


@rule("native_layer_norm")
def _layer_norm(
    c: Context, x: Any, normalized_shape: Sequence[int], weight: Any, bias: Any, eps: float
) -> Normalised:
    shape = c.shape(x)
    first = len(shape) - len(normalized_shape)
    dims = tuple(range(first, len(shape)))
    xhat, rstd, mean, _ = c.b.ops("standardize", c.real(x), dims=dims, eps=float(eps))
    kept = (*shape[:first], *(1 for _ in dims))
    y = _affine(c, xhat, weight, bias, tuple(normalized_shape))
    return y, c.reshape(mean, kept), c.reshape(rstd, kept)


@rule("native_group_norm")
def _group_norm(
    c: Context, x: Any, weight: Any, bias: Any, n: int, channels: int, spatial: int, group: int, eps: float
) -> Normalised:
    shape = c.shape(x)
    grouped = c.reshape(x, (n, group, numel(shape[1:]) // group))
    xhat, rstd, mean, _ = c.b.ops("standardize", c.real(grouped), dims=(2,), eps=float(eps))
    layout = (1, channels, *(1 for _ in shape[2:]))
    return _affine(c, c.reshape(xhat, shape), weight, bias, layout), mean, rstd


@rule("_weight_norm_interface")
def _weight_norm(c: Context, v: Any, g: Any, dim: int = 0) -> tuple[Value, Value]:
    """g·v/‖v‖, the norm over all dims but one (arXiv:1602.07868, equation 2)."""
    rank = len(c.shape(v))
    over = [d for d in range(rank) if d != dim % rank]
    norm = c.safe_sqrt(c.total(c("square", v), over, keepdim=True))
    return c("mul", v, c("div", g, norm)), norm
