"""Rules for softmax and losses. Reductions are PyTorch's: 0 none, 1 mean, 2 sum."""

from __future__ import annotations

import math
from typing import Any

from metafast.graph import Value
from metafast.normalise.shape import one_hot
from metafast.normalise.table import Context, rule
from metafast.normalise.views import Stop
from metafast.ops import numel

_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


@rule("_log_softmax", "log_softmax")
def _log_softmax(c: Context, x: Any, dim: int, half_to_float: bool = False) -> Value:
    shape = c.shape(x)
    if not shape:
        return c.reshape(c("log_softmax", c.reshape(x, (1,)), dim=0), ())
    return c("log_softmax", x, dim=dim % len(shape))


@rule("_softmax", "softmax")
def softmax(c: Context, x: Any, dim: int, half_to_float: bool = False) -> Value:
    return c("exp", _log_softmax(c, x, dim))


@rule("_safe_softmax")
def safe_softmax(c: Context, x: Any, dim: int, dtype: Any = None) -> Value:
    """Softmax, and 0 where all of a row is −∞ (attention to nothing): such a row is computed on harmless values."""
    nothing = c("eq", c.total(c("ne", x, -math.inf), dim, keepdim=True), 0.0)
    return c("where", nothing, 0.0, softmax(c, c("where", nothing, 0.0, x), dim))


# ---- classes --------------------------------------------------------------------------------------------------


def _rows(c: Context, logs: Any, target: Any) -> tuple[Any, Any]:
    """Log-probabilities (N, C), (C,) or (N, C, ...) and labels as (M, C) and (M,)."""
    shape = c.shape(logs)
    if len(shape) == 1:
        return c.reshape(logs, (1, shape[0])), c.reshape(target, (1,))
    if len(shape) > 2:
        logs = c.permute(logs, [0, *range(2, len(shape)), 1])
    count = numel(shape) // max(shape[1], 1) if shape[1] else numel(c.shape(target))
    return c.reshape(logs, (count, shape[1])), c.reshape(target, (count,))


def _nll(c: Context, logs: Any, hot: Value, weight: Any, reduction: int) -> tuple[Value, Value]:
    """−w_y·log p_y of each row, reduced, and the total weight. `where`: −∞ of another class must not become NaN."""
    picked, weights = c("where", hot, logs, 0.0), hot
    if weight is not None:
        picked, weights = c("mul", picked, weight), c("mul", hot, weight)
    if reduction == 0:
        return c("neg", c.total(picked, 1)), c.real(0.0)
    total, mass = c("neg", c.total(picked)), c.total(weights)
    return (total if reduction == 2 else c("div", total, mass)), mass


@rule("nll_loss_forward", "nll_loss2d_forward")
def _nll_loss(
    c: Context, logs: Any, target: Any, weight: Any, reduction: int, ignore_index: int
) -> tuple[Value, Value | None]:
    rows, labels = _rows(c, logs, target)
    hot = one_hot(c, labels, c.shape(rows)[1], ignore_index)
    loss, mass = _nll(c, rows, hot, weight, reduction)
    return c.reshape(loss, c.out[0].shape), mass if c.out[1].shape == () else None


@rule("cross_entropy")
def _cross_entropy(
    c: Context,
    logits: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Value:
    """Cross-entropy of labels with label smoothing ε: (1−ε)·nll + ε/C·Σ_c −w_c·log p_c, ignored rows left out."""
    if size_average is not None or reduce is not None:
        raise c.refuse("size_average and reduce are deprecated: use reduction")
    kind = _REDUCTIONS[reduction]
    dim = 0 if len(c.shape(logits)) == 1 else 1
    rows, labels = _rows(c, c("log_softmax", logits, dim=dim), target)
    classes = c.shape(rows)[1]
    hot = one_hot(c, labels, classes, ignore_index)
    kept = c.total(hot, 1, keepdim=True)
    nll, mass = _nll(c, rows, hot, weight, kind)
    everywhere = c("where", kept, rows, 0.0)
    if weight is not None:
        everywhere = c("mul", everywhere, weight)
    smooth = c("neg", c.total(everywhere, None if kind else 1))
    if kind == 1:
        smooth = c("div", smooth, mass)
    loss = c("add", c("mul", nll, 1.0 - label_smoothing), c("mul", smooth, label_smoothing / classes))
    return c.reshape(loss, c.out[0].shape)


# ---- distances ------------------------------------------------------------------------------------------------


@rule("mse_loss")
def _mse(c: Context, x: Any, y: Any, reduction: int = 1) -> Value:
    return c.reduce(c("square", c("sub", x, y)), reduction)


@rule("l1_loss")
def _l1(c: Context, x: Any, y: Any, reduction: int = 1) -> Value:
    return c.reduce(c("abs", c("sub", x, y)), reduction)


@rule("smooth_l1_loss")
def _smooth_l1(c: Context, x: Any, y: Any, reduction: int = 1, beta: float = 1.0) -> Value:
    gap = c("sub", x, y)
    size = c("abs", gap)
    if beta == 0:
        return c.reduce(size, reduction)
    close = c("lt", size, beta)
    near = c("mul", c("square", c("where", close, gap, 0.0)), 0.5 / beta)
    return c.reduce(c("where", close, near, c("sub", size, 0.5 * beta)), reduction)


@rule("huber_loss")
def _huber(c: Context, x: Any, y: Any, reduction: int = 1, delta: float = 1.0) -> Value:
    gap = c("sub", x, y)
    size = c("abs", gap)
    far = c("mul", c("sub", size, 0.5 * delta), delta)
    close = c("lt", size, delta)  # at the seam PyTorch's second derivative is that of the far side
    near = c("mul", c("square", c("where", close, gap, 0.0)), 0.5)
    return c.reduce(c("where", close, near, far), reduction)


# ---- probabilities --------------------------------------------------------------------------------------------


def _clipped_log(c: Context, x: Any) -> Value:
    """max(log x, −100), as PyTorch keeps binary cross-entropy finite."""
    logs = c("log", x)
    return c("where", c("lt", logs, -100.0), -100.0, logs)


def _bernoulli(c: Context, p: Any, target: Any) -> Value:
    other = c("log1p", c("neg", p))
    other = c("where", c("lt", other, -100.0), -100.0, other)
    return c("neg", c("add", c("mul", target, _clipped_log(c, p)), c("mul", c("sub", 1.0, target), other)))


@rule("binary_cross_entropy")
def _bce(c: Context, p: Any, target: Any, weight: Any = None, reduction: int = 1) -> Value:
    """Where p(1−p) < 1e-12 PyTorch's gradient is (p − target)/1e-12: there a parabola less its own value carries that
    slope. On the branch not taken p is replaced by ½, and so never divides by zero."""
    p = c.real(p)
    flat = c("lt", c("mul", c("sub", 1.0, p), p), 1e-12)
    inside = _bernoulli(c, c("where", flat, 0.5, p), target)
    frozen = Stop().get(c.b, p)
    parabola = c("mul", c("sub", c("mul", 0.5, c("square", p)), c("mul", Stop().get(c.b, c.real(target)), p)), 1e12)
    slope = c("sub", parabola, Stop().get(c.b, parabola))
    loss = c("where", flat, c("add", _bernoulli(c, frozen, target), slope), inside)
    return c.reduce(loss if weight is None else c("mul", loss, weight), reduction)


@rule("binary_cross_entropy_with_logits")
def _bce_logits(
    c: Context, x: Any, target: Any, weight: Any = None, pos_weight: Any = None, reduction: int = 1
) -> Value:
    """(1 − t)·x + (1 + (w⁺ − 1)·t)·log(1 + e^(−x))."""
    soft = c("softplus", c("neg", x))
    if pos_weight is not None:
        soft = c("mul", soft, c("add", 1.0, c("mul", c("sub", pos_weight, 1.0), target)))
    loss = c("add", c("mul", c("sub", 1.0, target), x), soft)
    return c.reduce(loss if weight is None else c("mul", loss, weight), reduction)


@rule("soft_margin_loss")
def _soft_margin(c: Context, x: Any, target: Any, reduction: int = 1) -> Value:
    return c.reduce(c("softplus", c("neg", c("mul", target, x))), reduction)
