"""Rules for matrix products, convolution and attention."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch

from metafast.graph import Value
from metafast.normalise.losses import safe_softmax, softmax
from metafast.normalise.table import Context, rule


def _swap(c: Context, x: Any) -> Value:
    rank = len(c.shape(x))
    return c.permute(x, [*range(rank - 2), rank - 1, rank - 2])


@rule("mm", "bmm")
def _matmul(c: Context, x: Any, y: Any) -> Value:
    return c("matmul", x, y)


@rule("mv")
def _mv(c: Context, x: Any, y: Any) -> Value:
    return c.reshape(c("matmul", x, c.reshape(y, (*c.shape(y), 1))), c.shape(x)[:1])


@rule("dot", "vdot")
def _dot(c: Context, x: Any, y: Any) -> Value:
    return c.total(c("mul", x, y))


def _plus(c: Context, x: Any, product: Value, beta: float, alpha: float) -> Value:
    """β·x + α·product; for β = 0 x is not read, not even where it is NaN."""
    scaled = c("mul", product, alpha)
    return scaled if beta == 0 else c("add", scaled, c("mul", x, beta))


@rule("addmm", "baddbmm")
def _addmm(c: Context, x: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Value:
    return _plus(c, x, c("matmul", a, b), beta, alpha)


@rule("addmv")
def _addmv(c: Context, x: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Value:
    return _plus(c, x, _mv(c, a, b), beta, alpha)


@rule("addbmm")
def _addbmm(c: Context, x: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Value:
    return _plus(c, x, c.total(c("matmul", a, b), 0), beta, alpha)


@rule("addr")
def _addr(c: Context, x: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Value:
    return _plus(c, x, c("mul", c.reshape(a, (*c.shape(a), 1)), b), beta, alpha)


@rule("linear")
def _linear(c: Context, x: Any, weight: Any, bias: Any = None) -> Value:
    shape = c.shape(x)
    flat = c.reshape(x, (math.prod(shape[:-1]), shape[-1]))
    y = c.reshape(c("matmul", flat, _swap(c, weight)), (*shape[:-1], c.shape(weight)[0]))
    return y if bias is None else c("add", y, bias)


@rule("_trilinear")
def _trilinear(
    c: Context,
    x: Any,
    y: Any,
    z: Any,
    expand1: Sequence[int],
    expand2: Sequence[int],
    expand3: Sequence[int],
    sumdim: Sequence[int],
    unroll_dim: int = 1,
) -> Value:
    """The product of three arrays, each given dims of size 1, summed over some dims (bilinear layers)."""
    rank = len(c.shape(x)) + len(expand1)

    def laid(v: Any, ones: Sequence[int]) -> Value:
        sizes = iter(c.shape(v))
        return c.reshape(v, [1 if d in ones else next(sizes) for d in range(rank)])

    product = c("mul", c("mul", laid(x, expand1), laid(y, expand2)), laid(z, expand3))
    return c.total(product, sumdim)


# ---- convolution ----------------------------------------------------------------------------------------------


def pair(x: int | Sequence[int]) -> tuple[int, int]:
    """One number for both dims, or one for each."""
    if isinstance(x, int):
        return x, x
    return (x[0], x[0]) if len(x) == 1 else (x[0], x[1])


@rule("convolution", "_convolution")
def _convolution(
    c: Context,
    x: Any,
    weight: Any,
    bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    *_: Any,
) -> Value:
    if transposed:
        raise c.refuse("transposed convolution has no native form")
    rank = len(c.shape(weight)) - 2
    if rank == 1:
        y = _conv1d(c, x, weight, stride[0], padding[0], dilation[0], groups)
    elif rank == 2:
        y = _conv2d(c, x, weight, pair(stride), pair(padding), pair(dilation), groups)
    else:
        raise c.refuse(f"convolution over {rank} dims has no native form")
    return y if bias is None else c("add", y, c.reshape(bias, (c.shape(bias)[0],) + (1,) * rank))


def _conv1d(c: Context, x: Any, weight: Any, stride: int, padding: int, dilation: int, groups: int) -> Value:
    """A convolution over pictures of height one."""
    (n, k, width), (o, kw, size) = c.shape(x), c.shape(weight)
    picture, kernel = c.reshape(x, (n, k, 1, width)), c.reshape(weight, (o, kw, 1, size))
    y = _conv2d(c, picture, kernel, (1, stride), (0, padding), (1, dilation), groups)
    return c.reshape(y, (y.shape[0], y.shape[1], y.shape[3]))


Pair = tuple[int, int]


def _conv2d(c: Context, x: Any, weight: Any, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> Value:
    """Groups side by side; where each is one channel (depthwise), a weighted sum of shifted pictures."""
    if groups > 1 and c.shape(weight)[1] == 1:
        return _depthwise(c, x, weight, stride, padding, dilation)
    if groups > _GROUPS:
        raise c.refuse(f"convolution in {groups} groups of several channels has no native form")
    wide, high = c.shape(x)[1] // groups, c.shape(weight)[0] // groups
    parts = [
        c(
            "conv2d",
            x if groups == 1 else c.piece(x, 1, g * wide, (g + 1) * wide),
            weight if groups == 1 else c.piece(weight, 0, g * high, (g + 1) * high),
            stride=stride,
            padding=padding,
            dilation=dilation,
        )
        for g in range(groups)
    ]
    return c.concat(parts, 1)


_GROUPS = 16  # of more groups the program grows too long


def _depthwise(c: Context, x: Any, weight: Any, stride: Pair, padding: Pair, dilation: Pair) -> Value:
    (n, channels, *_), (o, _, *kernel), size = c.shape(x), c.shape(weight), c.out[0].shape[-2:]
    if len(c.out[0].shape) == 3:
        size = (1, c.out[0].shape[-1])
    v = c.real(x)
    for d, p in zip((2, 3), padding, strict=True):
        if p:
            zeros = c.spread(0.0, tuple(p if i == d else k for i, k in enumerate(v.shape)))
            v = c.concat([zeros, v, zeros], d)
    if o != channels:  # several filters a channel
        v = c.reshape(v, (n, channels, 1, *v.shape[2:]))
        v = c.reshape(c.spread(v, (n, channels, o // channels, *v.shape[3:])), (n, o, *v.shape[3:]))
    total = c.real(0.0)
    for at in itertools.product(*(range(k) for k in kernel)):
        shifted, tap = v, weight
        for d, i in zip((2, 3), at, strict=True):
            first = i * dilation[d - 2]
            shifted = c.piece(shifted, d, first, first + (size[d - 2] - 1) * stride[d - 2] + 1, stride[d - 2])
            tap = c.piece(tap, d, i, i + 1)
        total = c("add", total, c("mul", shifted, c.reshape(tap, (o, 1, 1))))
    return total


# ---- attention and distances ----------------------------------------------------------------------------------


@rule("_scaled_dot_product_flash_attention_for_cpu")
def _attention(
    c: Context,
    query: Any,
    key: Any,
    value: Any,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Any = None,
    scale: float | None = None,
) -> tuple[Value, None]:
    if dropout_p:
        raise c.refuse("draws random numbers")
    factor = 1.0 / math.sqrt(c.shape(query)[-1]) if scale is None else scale
    scores = c("mul", c("matmul", query, _swap(c, key)), factor)
    if is_causal:
        scores = c("where", torch.ones(scores.shape[-2:]).tril(), scores, -math.inf)
    if attn_mask is not None:
        scores = c("add", scores, attn_mask)
    weights = (softmax if attn_mask is None else safe_softmax)(c, scores, -1)
    return c("matmul", weights, value), None


@rule("_cdist_forward")
def _cdist(c: Context, x: Any, y: Any, p: float, compute_mode: int | None) -> Value:
    (*batch, m, k), (n, _) = c.shape(x), c.shape(y)[-2:]
    gap = c("sub", c.reshape(x, (*batch, m, 1, k)), c.reshape(y, (*c.shape(y)[:-2], 1, n, k)))
    if p == 1:
        return c.total(c("abs", gap), -1)
    if p != 2:
        raise c.refuse(f"the distance of order {p} has no native form")
    return c.safe_sqrt(c.total(c("square", gap), -1))
