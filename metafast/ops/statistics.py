"""Normalisation by mean and variance over some dims: the core that batch, layer, group and instance norm share.

    standardize:  x̂ = (x − μ)·r,  r = (σ² + ε)^(−½), biased σ², over `dims`
    project:      P(v) = r·(v − m(v) − x̂·m(v·x̂)),  m = mean over `dims`

The Jacobian of standardize is P, and P is symmetric: one linear map is both its jvp and its vjp, and it needs x̂ and r
only (Ioffe & Szegedy 2015, arXiv:1502.03167, §3, in this form). Statistics have the shape of the kept dims.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from metafast.graph import Attrs, Builder, Node, Shape, Value
from metafast.ops.table import Op, Spec, add_maybe, numel, register, scale, spread


def _kept(shape: Shape, dims: tuple[int, ...]) -> Shape:
    return tuple(n for d, n in enumerate(shape) if d not in dims)


def _count(n: Node) -> int:
    return numel(tuple(n.inputs[0].shape[d] for d in n.attrs["dims"]))


def _back(t: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    for d in sorted(dims):
        t = t.unsqueeze(d)
    return t


def _standardize_infer(x: Sequence[Value], a: Attrs) -> tuple[Spec, ...]:
    stat = (_kept(x[0].shape, a["dims"]), "real")
    return ((x[0].shape, "real"), stat, stat, stat)


def _standardize_eval(x: list[torch.Tensor], a: Attrs) -> tuple[torch.Tensor, ...]:
    var, mean = torch.var_mean(x[0], a["dims"], correction=0)
    rstd = torch.rsqrt(var + a["eps"])
    return (x[0] - _back(mean, a["dims"])) * _back(rstd, a["dims"]), rstd, mean, var


def _standardize_vjp(b: Builder, n: Node, *cts: Value | None) -> list[Value | None]:
    xhat, rstd, *_ = n.outputs
    ct, ct_rstd, ct_mean, ct_var = cts
    dims, shape, count = n.attrs["dims"], xhat.shape, _count(n)
    out = None if ct is None else b.op("project", ct, xhat, rstd, dims=dims)
    along: Value | None = None  # what multiplies x̂: σ² moves by 2(x−μ)/n = 2x̂/(r n), r by −½ r³ of that
    if ct_var is not None:
        along = b.op("div", scale(b, ct_var, 2.0 / count), rstd)
    if ct_rstd is not None:
        along = add_maybe(b, along, scale(b, b.op("mul", ct_rstd, b.op("square", rstd)), -1.0 / count))
    if along is not None:
        out = add_maybe(b, out, b.op("mul", xhat, spread(b, along, dims, shape)))
    if ct_mean is not None:
        flat = spread(b, scale(b, ct_mean, 1.0 / count), dims, shape)
        out = add_maybe(b, out, b.op("expand", flat, shape=shape))
    return [out]


def _standardize_jvp(b: Builder, n: Node, t: Value | None) -> list[Value | None]:
    if t is None:
        return [None] * 4
    xhat, rstd, *_ = n.outputs
    p, corr = b.ops("project", t, xhat, rstd, dims=n.attrs["dims"])
    mean = scale(b, b.op("sum", t, dims=n.attrs["dims"]), 1.0 / _count(n))
    rstd_dot = b.op("neg", b.op("mul", b.op("square", rstd), corr))
    return [p, rstd_dot, mean, b.op("div", scale(b, corr, 2.0), rstd)]


def _passes(count: float) -> object:
    return lambda n: count * numel(n.inputs[0].shape)


register(
    Op(
        "standardize",
        _standardize_infer,
        _standardize_eval,
        "standardize",
        vjp=_standardize_vjp,
        jvp=_standardize_jvp,
        flops=_passes(6.0),  # type: ignore[arg-type]
        bound=1e-5,
    )
)


def _moments_infer(x: Sequence[Value], a: Attrs) -> tuple[Spec, ...]:
    return _standardize_infer(x, a)[1:]


register(
    Op(
        "moments",  # what standardize makes besides x̂
        _moments_infer,
        lambda x, a: _standardize_eval(x, a)[1:],
        "moments",
        flops=_passes(4.0),  # type: ignore[arg-type]
        bound=1e-5,
    )
)


def _mean(b: Builder, v: Value, dims: tuple[int, ...]) -> Value:
    return scale(b, b.op("sum", v, dims=dims), 1.0 / numel(tuple(v.shape[d] for d in dims)))


def _project_eval(x: list[torch.Tensor], a: Attrs) -> tuple[torch.Tensor, ...]:
    v, xhat, rstd = x
    corr = (v * xhat).mean(a["dims"])
    centred = v - v.mean(a["dims"], keepdim=True) - xhat * _back(corr, a["dims"])
    return centred * _back(rstd, a["dims"]), corr


def _project_vjp(b: Builder, n: Node, ct: Value | None, ct_corr: Value | None) -> list[Value | None]:
    v, xhat, rstd = n.inputs
    dims, shape = n.attrs["dims"], v.shape
    dv = dx = dr = None
    if ct is not None:
        dv, ct_x = b.ops("project", ct, xhat, rstd, dims=dims)
        both = b.op("add", *(
            b.op("mul", t, spread(b, c, dims, shape)) for t, c in ((ct, n.outputs[1]), (v, ct_x))
        ))
        dx = b.op("neg", b.op("mul", both, spread(b, rstd, dims, shape)))
        dr = b.op("div", b.op("sum", b.op("mul", ct, n.outputs[0]), dims=dims), rstd)
    if ct_corr is not None:
        share = spread(b, scale(b, ct_corr, 1.0 / _count(n)), dims, shape)
        dv, dx = add_maybe(b, dv, b.op("mul", share, xhat)), add_maybe(b, dx, b.op("mul", share, v))
    return [dv, dx, dr]


def _project_jvp(b: Builder, n: Node, *tangents: Value | None) -> list[Value | None]:
    v, xhat, rstd = n.inputs
    v_dot, xhat_dot, rstd_dot = tangents
    dims = n.attrs["dims"]
    out = corr = None
    if v_dot is not None:
        out, corr = b.ops("project", v_dot, xhat, rstd, dims=dims)
    if xhat_dot is not None and rstd_dot is not None:
        corr_dot = b.op("neg", b.op("div", rstd_dot, b.op("square", rstd)))
        moved = b.op("project_tangent", v, xhat, xhat_dot, rstd, corr_dot, dims=dims)
        out = add_maybe(b, out, moved)
        corr = add_maybe(b, corr, _mean(b, b.op("mul", v, xhat_dot), dims))
    elif xhat_dot is not None or rstd_dot is not None:
        raise NotImplementedError("x̂ and r of one standardize move together")
    return [out, corr]


register(
    Op(
        "project",
        lambda x, a: ((x[0].shape, "real"), (_kept(x[0].shape, a["dims"]), "real")),
        _project_eval,
        "project",
        vjp=_project_vjp,
        jvp=_project_jvp,
        flops=_passes(8.0),  # type: ignore[arg-type]
        bound=1e-5,
    )
)


def _project_tangent_eval(x: list[torch.Tensor], a: Attrs) -> tuple[torch.Tensor, ...]:
    v, xhat, xhat_dot, rstd, corr_dot = x
    dims = a["dims"]
    r, c = _back(rstd, dims), _back(corr_dot, dims)
    corr = (v * xhat).mean(dims, keepdim=True)
    p = r * (v - v.mean(dims, keepdim=True) - xhat * corr)
    return (-r * c * p - r * (xhat_dot * corr + xhat * (v * xhat_dot).mean(dims, keepdim=True)),)


register(
    Op(
        "project_tangent",  # how P(v) moves when x̂ and r do, v fixed; ṙ = −r²·corr_dot
        lambda x, a: ((x[0].shape, "real"),),
        _project_tangent_eval,
        "project_tangent",
        flops=_passes(14.0),  # type: ignore[arg-type]
        bound=1e-5,
    )
)
