"""Constants, views, and what moves or sums elements without computing on them. Views cost nothing: lowering turns them
into strides."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from metafast.graph import Attrs, Builder, Node, Shape, Value
from metafast.ops import winners
from metafast.ops.table import Op, Spec, broadcast, numel, register, sum_to


def _no_flops(node: Node) -> float:
    return 0.0


# ---- constants ------------------------------------------------------------------------------------------------

register(
    Op(
        "const",
        lambda x, a: (((), "real"),),
        lambda x, a: (torch.tensor(a["value"], dtype=a["dtype"]),),
        "constant",
        flops=_no_flops,
        vjp=lambda b, n, ct: [],
        jvp=lambda b, n: [None],
    )
)


def literal(b: Builder, tensor: torch.Tensor) -> Value:
    """A constant array, stored in the program as float64."""
    flat = tensor.detach().to(torch.float64).contiguous()
    if flat.dim() == 0:
        return b.const(float(flat))
    return b.op("literal", data=flat.numpy().tobytes(), shape=tuple(tensor.shape))


def literal_tensor(attrs: Attrs, dtype: torch.dtype) -> torch.Tensor:
    """The array of a literal node."""
    raw = torch.frombuffer(bytearray(attrs["data"]), dtype=torch.float64)
    return raw.reshape(attrs["shape"]).to(dtype)


register(
    Op(
        "literal",
        lambda x, a: ((a["shape"], "real"),),
        lambda x, a: (literal_tensor(a, a["dtype"]),),
        "constant",
        flops=_no_flops,
        vjp=lambda b, n, ct: [],
        jvp=lambda b, n: [None],
    )
)

# ---- views ----------------------------------------------------------------------------------------------------


def _reshape_infer(x: Sequence[Value], a: Attrs) -> tuple[Spec, ...]:
    if numel(x[0].shape) != numel(a["shape"]):
        raise ValueError(f"reshape: {x[0].shape} has not the elements of {a['shape']}")
    return ((a["shape"], x[0].dtype),)


def _reshape_simplify(b: Builder, x: tuple[Value, ...], a: dict[str, Shape]) -> Value | None:
    if x[0].shape == a["shape"]:
        return x[0]
    n = b.producer(x[0])
    return b.op("reshape", n.inputs[0], shape=a["shape"]) if n is not None and n.op == "reshape" else None


register(
    Op(
        "reshape",
        _reshape_infer,
        lambda x, a: (x[0].reshape(a["shape"]),),
        "view",
        vjp=lambda b, n, ct: [None if ct is None else b.op("reshape", ct, shape=n.inputs[0].shape)],
        jvp=lambda b, n, t: [None if t is None else b.op("reshape", t, shape=n.attrs["shape"])],
        simplify=_reshape_simplify,
        flops=_no_flops,
        bound=0.0,
    )
)


def _permute_simplify(b: Builder, x: tuple[Value, ...], a: dict[str, tuple[int, ...]]) -> Value | None:
    dims = a["dims"]
    if dims == tuple(range(len(dims))):
        return x[0]
    n = b.producer(x[0])
    if n is not None and n.op == "permute":
        return b.op("permute", n.inputs[0], dims=tuple(n.attrs["dims"][d] for d in dims))
    r = len(dims)
    if n is not None and n.op == "matmul" and dims == (*range(r - 2), r - 1, r - 2):
        # (x·y)ᵀ = yᵀ·xᵀ: the gradient of a transposed weight comes out as the weight lies, ready to be stored
        return b.op("matmul", *(b.op("permute", v, dims=dims) for v in reversed(n.inputs)))
    return None


def _inverse(dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dims.index(d) for d in range(len(dims)))


register(
    Op(
        "permute",
        lambda x, a: ((tuple(x[0].shape[d] for d in a["dims"]), x[0].dtype),),
        lambda x, a: (x[0].permute(a["dims"]),),
        "view",
        vjp=lambda b, n, ct: [None if ct is None else b.op("permute", ct, dims=_inverse(n.attrs["dims"]))],
        jvp=lambda b, n, t: [None if t is None else b.op("permute", t, dims=n.attrs["dims"])],
        simplify=_permute_simplify,
        flops=_no_flops,
        bound=0.0,
    )
)


def _expand_infer(x: Sequence[Value], a: Attrs) -> tuple[Spec, ...]:
    if broadcast(x[0].shape, a["shape"]) != a["shape"]:
        raise ValueError(f"expand: {x[0].shape} does not broadcast to {a['shape']}")
    return ((a["shape"], x[0].dtype),)


register(
    Op(
        "expand",
        _expand_infer,
        lambda x, a: (x[0].expand(a["shape"]),),
        "view",
        vjp=lambda b, n, ct: [None if ct is None else sum_to(b, ct, n.inputs[0].shape)],
        jvp=lambda b, n, t: [None if t is None else b.op("expand", t, shape=n.attrs["shape"])],
        simplify=lambda b, x, a: x[0] if x[0].shape == a["shape"] else None,
        flops=_no_flops,
        bound=0.0,
    )
)


def _sliced(shape: Shape, a: Attrs) -> Shape:
    size = len(range(a["start"], a["stop"], a["step"]))
    return (*shape[: a["dim"]], size, *shape[a["dim"] + 1 :])


def _slice_of(x: torch.Tensor, a: Attrs) -> torch.Tensor:
    return x[(slice(None),) * a["dim"] + (slice(a["start"], a["stop"], a["step"]),)]


def _slice_vjp(b: Builder, n: Node, ct: Value | None) -> list[Value | None]:
    return [None if ct is None else b.op("pad", ct, size=n.inputs[0].shape[n.attrs["dim"]], **n.attrs)]


def _whole(b: Builder, x: tuple[Value, ...], a: dict[str, int]) -> Value | None:
    return x[0] if (a["start"], a["step"]) == (0, 1) and a["stop"] == x[0].shape[a["dim"]] else None


register(
    Op(
        "slice",  # dim, start, stop, step with 0 <= start <= stop <= size, step >= 1
        lambda x, a: ((_sliced(x[0].shape, a), x[0].dtype),),
        lambda x, a: (_slice_of(x[0], a),),
        "view",
        vjp=_slice_vjp,
        jvp=lambda b, n, t: [None if t is None else b.op("slice", t, **n.attrs)],
        simplify=_whole,
        flops=_no_flops,
        bound=0.0,
    )
)

register(
    Op(
        "stop_gradient",
        lambda x, a: ((x[0].shape, x[0].dtype),),
        lambda x, a: (x[0],),
        "view",
        vjp=lambda b, n, ct: [None],
        jvp=lambda b, n, t: [None],
        flops=_no_flops,
        bound=0.0,
    )
)

# ---- moving elements ------------------------------------------------------------------------------------------


def _pad_eval(x: list[torch.Tensor], a: Attrs) -> tuple[torch.Tensor, ...]:
    shape = list(x[0].shape)
    shape[a["dim"]] = a["size"]
    out = x[0].new_zeros(shape)
    _slice_of(out, a).copy_(x[0])
    return (out,)


def _unpad(n: Node) -> dict[str, int]:
    return {k: n.attrs[k] for k in ("dim", "start", "stop", "step")}


register(
    Op(
        "pad",  # zeros of `size` along dim, the input laid into start:stop:step — the adjoint of slice
        lambda x, a: (((*x[0].shape[: a["dim"]], a["size"], *x[0].shape[a["dim"] + 1 :]), "real"),),
        _pad_eval,
        "pad",
        vjp=lambda b, n, ct: [None if ct is None else b.op("slice", ct, **_unpad(n))],
        jvp=lambda b, n, t: [None if t is None else b.op("pad", t, **n.attrs)],
        flops=_no_flops,
        bound=0.0,
    )
)


def _concat_infer(x: Sequence[Value], a: Attrs) -> tuple[Spec, ...]:
    d, first = a["dim"], x[0].shape
    if any(v.shape[:d] + v.shape[d + 1 :] != first[:d] + first[d + 1 :] for v in x):
        raise ValueError(f"concat: {[v.shape for v in x]} differ outside dim {d}")
    return (((*first[:d], sum(v.shape[d] for v in x), *first[d + 1 :]), "real"),)


def _concat_vjp(b: Builder, n: Node, ct: Value | None) -> list[Value | None]:
    if ct is None:
        return [None] * len(n.inputs)
    d, at, out = n.attrs["dim"], 0, []
    for v in n.inputs:
        out.append(b.op("slice", ct, dim=d, start=at, stop=at + v.shape[d], step=1))
        at += v.shape[d]
    return list(out)


def _concat_jvp(b: Builder, n: Node, *t: Value | None) -> list[Value | None]:
    if all(v is None for v in t):
        return [None]
    zero = b.const(0.0)
    parts = [b.op("expand", zero, shape=x.shape) if v is None else v for v, x in zip(t, n.inputs, strict=True)]
    return [b.op("concat", *parts, **n.attrs)]


register(
    Op(
        "concat",
        _concat_infer,
        lambda x, a: (torch.cat(x, a["dim"]),),
        "concat",
        vjp=_concat_vjp,
        jvp=_concat_jvp,
        simplify=lambda b, x, a: x[0] if len(x) == 1 else None,
        flops=_no_flops,
        bound=0.0,
    )
)

register(
    Op(
        "interleave",  # the same elements, laid out in memory as the dims stand; written by lower/interleave.py
        lambda x, a: ((x[0].shape, x[0].dtype),),
        lambda x, a: (x[0],),
        "interleave",
        flops=_no_flops,
        bound=0.0,
    )
)

# ---- sums -----------------------------------------------------------------------------------------------------


def _sum_infer(x: Sequence[Value], a: Attrs) -> tuple[Spec, ...]:
    return ((tuple(n for d, n in enumerate(x[0].shape) if d not in a["dims"]), "real"),)


def _sum_vjp(b: Builder, n: Node, ct: Value | None) -> list[Value | None]:
    if ct is None:
        return [None]
    shape = n.inputs[0].shape
    kept = tuple(1 if d in n.attrs["dims"] else s for d, s in enumerate(shape))
    return [b.op("expand", b.op("reshape", ct, shape=kept), shape=shape)]


register(
    Op(
        "sum",
        _sum_infer,
        lambda x, a: (x[0].sum(a["dims"]) if a["dims"] else x[0],),
        "reduce",
        vjp=_sum_vjp,
        jvp=lambda b, n, t: [None if t is None else b.op("sum", t, **n.attrs)],
        simplify=lambda b, x, a: winners.total(b, x, a) if a["dims"] else x[0],
        flops=lambda n: float(numel(n.inputs[0].shape)),
        bound=4e-6,
    )
)


def _winners(b: Builder, n: Node) -> Value:
    """1 at each maximum of its row, shared evenly where there are several (as PyTorch shares the cotangent)."""
    x, y = n.inputs[0], n.outputs[0]
    kept = tuple(1 if d in n.attrs["dims"] else s for d, s in enumerate(x.shape))
    hot = b.op("eq", x, b.op("reshape", y, shape=kept))
    return b.op("div", hot, b.op("reshape", b.op("sum", hot, **n.attrs), shape=kept))


def _amax_vjp(b: Builder, n: Node, ct: Value | None) -> list[Value | None]:
    spread = _sum_vjp(b, n, ct)[0]
    return [None if spread is None else b.op("mul", spread, _winners(b, n))]


def _amax_jvp(b: Builder, n: Node, t: Value | None) -> list[Value | None]:
    return [None if t is None else b.op("sum", b.op("mul", t, _winners(b, n)), **n.attrs)]


register(
    Op(
        "amax",  # the greatest over dims; NaN where one is among them
        _sum_infer,
        lambda x, a: (x[0].amax(a["dims"]) if a["dims"] else x[0],),
        "reduce",
        vjp=_amax_vjp,
        jvp=_amax_jvp,
        simplify=lambda b, x, a: x[0] if not a["dims"] else None,
        flops=lambda n: float(numel(n.inputs[0].shape)),
        bound=0.0,
    )
)


def _cumsum_eval(x: list[torch.Tensor], a: Attrs) -> tuple[torch.Tensor, ...]:
    d = a["dim"]
    return (x[0].flip(d).cumsum(d).flip(d) if a["reverse"] else x[0].cumsum(d),)


def _cumsum_vjp(b: Builder, n: Node, ct: Value | None) -> list[Value | None]:
    return [None if ct is None else b.op("cumsum", ct, dim=n.attrs["dim"], reverse=not n.attrs["reverse"])]


register(
    Op(
        "cumsum",  # sums up to each place along dim; from the end where `reverse`, which is the adjoint
        lambda x, a: ((x[0].shape, "real"),),
        _cumsum_eval,
        "cumsum",
        vjp=_cumsum_vjp,
        jvp=lambda b, n, t: [None if t is None else b.op("cumsum", t, **n.attrs)],
    )
)
