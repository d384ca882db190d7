"""Bilinear ops: matrix product and convolution. Each family is closed under differentiation: the adjoint of a member in
one argument is a member, and a tangent is the sum of two."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from metafast.graph import Attrs, Builder, Node, Value
from metafast.ops.table import Error, Op, Rule, Spec, add_maybe, numel, register

# ---- how exact the native kernels are ---------------------------------------------------------------------------

_IN_BLOCKS = Error(
    lambda n: min(n, 192) + n / 192 + 3,
    "element",
    "Higham, Accuracy and Stability of Numerical Algorithms, 2002, 3.1: an inner product in pieces, here of 192 terms",
)
_DIRECT = Error(
    lambda n: n + 2, "element", "Higham 2002, 3.1: an inner product in any order; one more for a bias, one to add"
)
_WINOGRAD = Error(
    lambda n: 8,
    "array",
    "measured, for entries of one distribution of about one size; no proof: a transform spreads the roundings of its "
    "largest entry over a tile. Magnitudes over eight decades have come to three times as much",
)


def _winograd_proved(products: Callable[[int], float]) -> Error:
    """164 is max_ij (Σ_kp |A_pi G_pj B_pk|)², what the transforms of both axes make of magnitudes, with the points of
    csrc/kernels/cpu/winograd.cpp; 22 are the roundings of the transforms, of a bias and of adding."""
    return Error(
        lambda n: 164 * (22 + products(n)),
        "operands",
        "Barabasz, Anderson, Soodhalter and Gregg, ACM TOMS 46(4), 2020, arXiv:1803.10986: the roundings of the "
        "transforms and of the products add up, times the norms of the transforms",
    )


def _down_measured(roundings: float) -> Error:
    return Error(
        lambda n: roundings,
        "array",
        "measured, as that of both axes; a rounding is spread over fewer values, but of few channels a sum is smaller",
    )


def _down_proved(products: Callable[[int], float]) -> Error:
    """12.8 is max_ij Σ_kp |A_pi G_pj B_pk|, what the transforms of one axis make of magnitudes; 12 are their roundings,
    and those of a bias and of adding (csrc/kernels/cpu/winograd_down.cpp)."""
    return Error(lambda n: 12.8 * (12 + products(n)), "operands", _winograd_proved(products).source)


def _bilinear_jvp(b: Builder, n: Node, t0: Value | None, t1: Value | None) -> list[Value | None]:
    x, y = n.inputs
    left = None if t0 is None else b.op(n.op, t0, y, **n.attrs)
    right = None if t1 is None else b.op(n.op, x, t1, **n.attrs)
    return [add_maybe(b, left, right)]


# ---- matrix product: (..., m, k) · (..., k, n), equal leading dims ----------------------------------------------


def _matmul_infer(x: Sequence[Value], a: Attrs) -> tuple[Spec, ...]:
    p, q = x[0].shape, x[1].shape
    if len(p) < 2 or p[:-2] != q[:-2] or p[-1] != q[-2]:
        raise ValueError(f"matmul: shapes {p} and {q} do not fit")
    return (((*p[:-1], q[-1]), "real"),)


def transpose(b: Builder, v: Value) -> Value:
    """Swap the last two dims."""
    r = len(v.shape)
    return b.op("permute", v, dims=(*range(r - 2), r - 1, r - 2))


def _matmul_vjp(b: Builder, n: Node, ct: Value | None) -> list[Value | None]:
    if ct is None:
        return [None, None]
    x, y = n.inputs
    return [b.op("matmul", ct, transpose(b, y)), b.op("matmul", transpose(b, x), ct)]


register(
    Op(
        "matmul",
        _matmul_infer,
        lambda x, a: (x[0] @ x[1],),
        "matmul",
        vjp=_matmul_vjp,
        jvp=_bilinear_jvp,
        flops=lambda n: 2.0 * numel(n.outputs[0].shape) * n.inputs[0].shape[-1],
        bound=4e-6,
        errors={"direct": _IN_BLOCKS},
    )
)

# ---- the same for tasks side by side: (m, k, lanes) · (k, n, lanes), a lane dim of 1 being shared. Only lowering
# writes it, after differentiation (see lower/interleave.py), so that it has no rules ----------------------------


def _lanes_infer(x: Sequence[Value], a: Attrs) -> tuple[Spec, ...]:
    (m, k, *p), (k2, n, *q) = x[0].shape, x[1].shape
    if len(p) != 1 or len(q) != 1 or k != k2 or (1 not in (p[0], q[0]) and p != q):
        raise ValueError(f"matmul_lanes: shapes {x[0].shape} and {x[1].shape} do not fit")
    return (((m, n, max(p[0], q[0])), "real"),)


register(
    Op(
        "matmul_lanes",
        _lanes_infer,
        lambda x, a: ((x[0].movedim(-1, 0) @ x[1].movedim(-1, 0)).movedim(0, -1),),
        "matmul_lanes",
        flops=lambda n: 2.0 * numel(n.outputs[0].shape) * n.inputs[0].shape[1],
        bound=4e-6,
        errors={"lanes": _IN_BLOCKS},
    )
)

# ---- convolution: x (N,C,H,W), w (O,C,KH,KW), y (N,O,OH,OW); attrs stride, padding, dilation, all pairs; the adjoints
# carry `size` = (H, W) of x, or `kernel` = (KH, KW) of w ----------------------------------------------------------


def _out_size(size: tuple[int, int], kernel: tuple[int, int], a: Attrs) -> tuple[int, int]:
    h, w = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, a["stride"], a["padding"], a["dilation"], strict=True)
    )
    return h, w


def _conv_infer(x: Sequence[Value], a: Attrs) -> tuple[Spec, ...]:
    (n, c, *size), (o, cw, *kernel) = x[0].shape, x[1].shape
    if c != cw:
        raise ValueError(f"conv2d: input has {c} channels, weight {cw}")
    return (((n, o, *_out_size((size[0], size[1]), (kernel[0], kernel[1]), a)), "real"),)


def _geometry(a: Attrs) -> dict[str, tuple[int, int]]:
    return {k: a[k] for k in ("stride", "padding", "dilation")}


def _size(v: Value) -> tuple[int, int]:
    return v.shape[2], v.shape[3]


def _dx(b: Builder, dy: Value, w: Value, size: tuple[int, int], a: Attrs) -> Value:
    return b.op("conv2d_dx", dy, w, size=size, **_geometry(a))


def _dw(b: Builder, x: Value, dy: Value, kernel: tuple[int, int], a: Attrs) -> Value:
    return b.op("conv2d_dw", x, dy, kernel=kernel, **_geometry(a))


def _y(b: Builder, x: Value, w: Value, a: Attrs) -> Value:
    return b.op("conv2d", x, w, **_geometry(a))


def _conv_vjp(b: Builder, n: Node, ct: Value | None) -> list[Value | None]:
    if ct is None:
        return [None, None]
    x, w = n.inputs
    return [_dx(b, ct, w, _size(x), n.attrs), _dw(b, x, ct, _size(w), n.attrs)]


def _dx_vjp(b: Builder, n: Node, ct: Value | None) -> list[Value | None]:
    if ct is None:
        return [None, None]
    dy, w = n.inputs
    return [_y(b, ct, w, n.attrs), _dw(b, ct, dy, _size(w), n.attrs)]


def _dw_vjp(b: Builder, n: Node, ct: Value | None) -> list[Value | None]:
    if ct is None:
        return [None, None]
    x, dy = n.inputs
    return [_dx(b, dy, ct, _size(x), n.attrs), _y(b, x, ct, n.attrs)]


def _backward(x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor, a: Attrs, mask: list[bool]) -> torch.Tensor:
    out = torch.ops.aten.convolution_backward(
        dy, x, w, None, a["stride"], a["padding"], a["dilation"], False, [0, 0], 1, mask
    )
    return out[mask.index(True)]


def _dx_eval(x: list[torch.Tensor], a: Attrs) -> tuple[torch.Tensor, ...]:
    dy, w = x
    return (_backward(dy.new_empty((dy.shape[0], w.shape[1], *a["size"])), w, dy, a, [True, False, False]),)


def _dw_eval(x: list[torch.Tensor], a: Attrs) -> tuple[torch.Tensor, ...]:
    inp, dy = x
    w = inp.new_empty((dy.shape[1], inp.shape[1], *a["kernel"]))
    return (_backward(inp, w, dy, a, [False, True, False]),)


def _conv_row(
    name: str,
    infer: object,
    evaluate: object,
    vjp: Rule,
    flops: object,
    products: Callable[[int], float],
    products_down: Callable[[int], float],
    down: float,
) -> None:
    errors = {
        "direct": _DIRECT,
        "winograd": _WINOGRAD,
        "winograd, any entries": _winograd_proved(products),
        "winograd down": _down_measured(down),
        "winograd down, any entries": _down_proved(products_down),
    }
    register(
        Op(name, infer, evaluate, "conv2d", vjp, _bilinear_jvp, flops=flops, bound=8e-6, errors=errors)  # type: ignore[arg-type]
    )


def _over_channels(n: int) -> float:
    """Of 9 C terms: chains of at most 32 channels, whose sums are a chain."""
    return 32 + n / 288


def _over_taps(n: int) -> float:
    """Of 9 C terms: one chain over the taps across and the channels."""
    return n / 3


def _over_tiles(n: int) -> float:
    """Of n pixels: one chain over tiles, which have two pixels or more."""
    return n / 2


_conv_row(
    "conv2d",
    _conv_infer,
    lambda x, a: (torch.conv2d(x[0], x[1], None, a["stride"], a["padding"], a["dilation"]),),
    _conv_vjp,
    lambda n: 2.0 * numel(n.outputs[0].shape) * numel(n.inputs[1].shape[1:]),
    _over_channels,
    _over_taps,
    7,
)
_conv_row(
    "conv2d_dx",
    lambda x, a: (((x[0].shape[0], x[1].shape[1], *a["size"]), "real"),),
    _dx_eval,
    _dx_vjp,
    lambda n: 2.0 * numel(n.inputs[0].shape) * numel(n.inputs[1].shape[1:]),
    _over_channels,
    _over_taps,
    7,
)
_conv_row(
    "conv2d_dw",
    lambda x, a: (((x[1].shape[1], x[0].shape[1], *a["kernel"]), "real"),),
    _dw_eval,
    _dw_vjp,
    lambda n: 2.0 * numel(n.inputs[1].shape) * numel(n.outputs[0].shape[1:]),
    _over_tiles,
    _over_tiles,
    3,
)
