"""What losses are made of beyond pointwise functions and sums: log-softmax and the indicator of class labels."""

from __future__ import annotations

import torch

from metafast.graph import Attrs, Builder, Node, Value
from metafast.ops.table import Op, numel, register, spread


def _total(b: Builder, v: Value, dim: int) -> Value:
    return spread(b, b.op("sum", v, dims=(dim,)), (dim,), v.shape)


def _vjp(b: Builder, n: Node, ct: Value | None) -> list[Value | None]:
    if ct is None:
        return [None]
    p = b.op("exp", n.outputs[0])
    return [b.op("sub", ct, b.op("mul", p, _total(b, ct, n.attrs["dim"])))]


def _jvp(b: Builder, n: Node, t: Value | None) -> list[Value | None]:
    if t is None:
        return [None]
    p = b.op("exp", n.outputs[0])
    return [b.op("sub", t, _total(b, b.op("mul", p, t), n.attrs["dim"]))]


register(
    Op(
        "log_softmax",
        lambda x, a: ((x[0].shape, "real"),),
        lambda x, a: (torch.log_softmax(x[0], a["dim"]),),
        "log_softmax",
        vjp=_vjp,
        jvp=_jvp,
        flops=lambda n: 5.0 * numel(n.inputs[0].shape),
    )
)


def _one_hot_eval(x: list[torch.Tensor], a: Attrs) -> tuple[torch.Tensor, ...]:
    labels, classes = x[0].long(), torch.arange(a["classes"])
    kept = (labels != a["ignore_index"])[:, None]
    if a["wraps"]:
        labels = torch.where(labels < 0, labels + a["classes"], labels)
    return ((labels[:, None] == classes).to(a["dtype"]) * kept,)


register(
    Op(
        "one_hot",  # labels (N,), int or whole reals -> (N, classes): 1 at the label; zeros where it is ignore_index
        # with `wraps` a label below 0 counts from the end
        lambda x, a: (((x[0].shape[0], a["classes"]), "real"),),
        _one_hot_eval,
        "one_hot",
        vjp=lambda b, n, ct: [None],
        jvp=lambda b, n, t: [None],
        bound=0.0,
    )
)
