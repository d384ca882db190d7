"""Pooling. The winners of a maximum are an output of their own; gathering and scattering along them are each other's
adjoints, as are averaging and its spreading."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from metafast.graph import Attrs, Builder, Node, Value
from metafast.ops import winners
from metafast.ops.table import Op, Rule, Spec, numel, register


def _windows(size: int, k: int, s: int, p: int, d: int, ceil: bool) -> int:
    span = size + 2 * p - d * (k - 1) - 1
    n = -(-span // s) + 1 if ceil else span // s + 1
    return n - 1 if ceil and (n - 1) * s >= size + p else n


def _pooled(x: Value, a: Attrs) -> tuple[int, ...]:
    size = (
        _windows(n, k, s, p, d, a["ceil"])
        for n, k, s, p, d in zip(
            x.shape[2:], a["kernel"], a["stride"], a["padding"], a.get("dilation", (1, 1)), strict=True
        )
    )
    return (*x.shape[:2], *size)


def _linear(adjoint: str, **extra: str) -> tuple[Rule, Rule]:
    """vjp and jvp of an op that is linear in its first input; `extra` inputs (winners) stay."""

    def attrs(n: Node) -> dict[str, tuple[int, int]]:
        return {"size": n.inputs[0].shape[2:]}  # type: ignore[dict-item]

    def vjp(b: Builder, n: Node, ct: Value | None) -> list[Value | None]:
        rest = n.inputs[1:]
        if ct is None:
            return [None] * len(n.inputs)
        more = {} if adjoint == "pool_gather" else attrs(n)
        return [b.op(adjoint, ct, *rest, **more), *(None for _ in rest)]

    def jvp(b: Builder, n: Node, t: Value | None, *_: Value | None) -> list[Value | None]:
        return [None if t is None else b.op(n.op, t, *n.inputs[1:], **n.attrs)]

    return vjp, jvp


# ---- maximum --------------------------------------------------------------------------------------------------


def _max_infer(x: Sequence[Value], a: Attrs) -> tuple[Spec, ...]:
    if len(x) > 1 and x[1].shape != (x[0].shape[1],):
        raise ValueError(f"max_pool: a sign for each of the channels of {x[0].shape} expected, got {x[1].shape}")
    shape = _pooled(x[0], a)
    return (shape, "real"), (shape, "index")


def _max_eval(x: list[torch.Tensor], a: Attrs) -> tuple[torch.Tensor, ...]:
    key = x[0] if len(x) == 1 else x[0] * x[1].reshape(-1, 1, 1)
    y, at = F.max_pool2d(key, a["kernel"], a["stride"], a["padding"], a["dilation"], a["ceil"], True)
    return y if len(x) == 1 else _gather_eval([x[0], at], a)[0], at


def _max_vjp(b: Builder, n: Node, ct: Value | None, _: Value | None) -> list[Value | None]:
    size = n.inputs[0].shape[2:]
    rest = [None for _ in n.inputs[1:]]
    return [None if ct is None else b.op("pool_scatter", ct, n.outputs[1], size=size), *rest]


def _max_jvp(b: Builder, n: Node, t: Value | None, *_: Value | None) -> list[Value | None]:
    return [None if t is None else b.op("pool_gather", t, n.outputs[1]), None]


register(
    Op(  # x, and perhaps a sign (C): what wins is the largest of sign·x, and y is x there
        "max_pool", _max_infer, _max_eval, "max_pool", vjp=_max_vjp, jvp=_max_jvp, bound=0.0
    )
)


def _gather_eval(x: list[torch.Tensor], a: Attrs) -> tuple[torch.Tensor, ...]:
    v, idx = x
    return (v.flatten(2).gather(2, idx.long().flatten(2)).reshape(idx.shape),)


def _scatter_eval(x: list[torch.Tensor], a: Attrs) -> tuple[torch.Tensor, ...]:
    ct, idx = x
    out = ct.new_zeros((*ct.shape[:2], numel(a["size"])))
    out.scatter_add_(2, idx.long().flatten(2), ct.flatten(2))
    return (out.reshape(*ct.shape[:2], *a["size"]),)


_vjp, _jvp = _linear("pool_scatter")
register(
    Op(
        "pool_gather",
        lambda x, a: ((x[1].shape, "real"),),
        _gather_eval,
        "pool_gather",
        vjp=_vjp,
        jvp=_jvp,
        simplify=winners.gather,
        bound=0.0,
    )
)
_vjp, _jvp = _linear("pool_gather")
register(
    Op(
        "pool_scatter",
        lambda x, a: (((*x[0].shape[:2], *a["size"]), "real"),),
        _scatter_eval,
        "pool_scatter",
        vjp=_vjp,
        jvp=_jvp,
        bound=1e-6,
    )
)

# ---- average --------------------------------------------------------------------------------------------------


def _avg(x: torch.Tensor, a: Attrs) -> torch.Tensor:
    return F.avg_pool2d(
        x, a["kernel"], a["stride"], a["padding"], a["ceil"], a["count_include_pad"], a["divisor"] or None
    )


def _avg_adj_eval(x: list[torch.Tensor], a: Attrs) -> tuple[torch.Tensor, ...]:
    with torch.enable_grad():
        like = x[0].new_zeros((*x[0].shape[:2], *a["size"])).requires_grad_()
        return torch.autograd.grad(_avg(like, a), like, x[0])


def _drop_size(a: Attrs) -> dict[str, object]:
    return {k: v for k, v in a.items() if k != "size"}


register(
    Op(
        "avg_pool",
        lambda x, a: ((_pooled(x[0], a), "real"),),
        lambda x, a: (_avg(x[0], a),),
        "avg_pool",
        vjp=lambda b, n, ct: [
            None if ct is None else b.op("avg_pool_adj", ct, size=n.inputs[0].shape[2:], **n.attrs)
        ],
        jvp=lambda b, n, t: [None if t is None else b.op("avg_pool", t, **n.attrs)],
    )
)
register(
    Op(
        "avg_pool_adj",
        lambda x, a: (((*x[0].shape[:2], *a["size"]), "real"),),
        _avg_adj_eval,
        "avg_pool_adj",
        vjp=lambda b, n, ct: [None if ct is None else b.op("avg_pool", ct, **_drop_size(n.attrs))],
        jvp=lambda b, n, t: [None if t is None else b.op("avg_pool_adj", t, **n.attrs)],
    )
)
