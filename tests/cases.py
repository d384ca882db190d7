"""One table of op cases: what every backend and every derivative of every op is tested on.

A `Case` names a row of `metafast.ops.TABLE`, its arguments (shape, how they lie in memory, what numbers they
hold) and its attributes; `REFERENCE` says in differentiable PyTorch what the op means. `write` turns a case
into a Graph whose inputs are dense arrays and whose first nodes are the views (permute, slice, expand) that
give the arguments their layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from metafast.graph import Builder, Graph, Shape, Value

Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Arg:
    """One argument of a case.

    `layout`: how the op sees it (dense, permuted, strided, offset, expanded, nhwc: a view of a dense input).
    `draw`: what numbers it holds (normal, large, positive, beyond 2, unit, away from zero, truth, ties, signs,
    counts, labels, winners, or const: the number `of`, written into the graph).
    """

    shape: Shape
    layout: str = "dense"
    draw: str = "normal"
    of: Any = (
        None  # const: the number; labels: how many classes; winners: (shape pooled, attrs of the max_pool)
    )

    @property
    def moves(self) -> bool:
        """Whether derivatives with respect to it are asked for."""
        return self.draw not in ("labels", "winners", "truth", "const", "signs")


@dataclass(frozen=True, eq=False)
class Case:
    """`op(args; attrs)`; `outputs`: which outputs are looked at (all if None)."""

    op: str
    args: tuple[Arg, ...]
    attrs: dict[str, Any] = field(default_factory=dict)
    outputs: tuple[int, ...] | None = None

    def __str__(self) -> str:
        shapes = ",".join(
            f"{'x'.join(map(str, a.shape)) or '()'}:{a.layout}:{a.draw}{_number(a)}" for a in self.args
        )
        attrs = ",".join(f"{k}={v}" for k, v in self.attrs.items() if k != "data").replace(" ", "")
        picked = "" if self.outputs is None else f"-out{self.outputs}".replace(" ", "")
        return f"{self.op}-{shapes}-{attrs}{picked}".replace(":dense", "").replace(":normal", "")

    def tensors(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """The dense arrays behind the arguments: the same numbers for the same case, rounded to `dtype`."""
        generator = torch.Generator().manual_seed(sum(map(ord, str(self))))
        return [_draw(a, generator).to(dtype) if _is_real(a) else _draw(a, generator) for a in self.args]


def _number(arg: Arg) -> str:
    return str(arg.of) if arg.draw == "const" else ""


def _is_real(arg: Arg) -> bool:
    return arg.draw != "labels"


def _base(arg: Arg) -> Shape:
    """The shape of the dense array whose view the argument is."""
    shape = arg.of[0] if arg.draw == "winners" else arg.shape
    if arg.layout == "permuted":
        return shape[::-1]
    if arg.layout == "nhwc":
        return (shape[0], shape[2], shape[3], shape[1])
    if arg.layout == "strided":
        return (*shape[:-1], 2 * shape[-1] + 1) if shape else (3,)
    if arg.layout == "offset":
        return (shape[0] + 3, *shape[1:])
    if arg.layout == "expanded":
        return (1, *shape[1:])
    return shape


def _draw(arg: Arg, generator: torch.Generator) -> torch.Tensor:
    shape = _base(arg)
    if arg.draw == "const":
        return torch.tensor(arg.of, dtype=torch.float64)
    if arg.draw == "labels":
        return torch.randint(0, arg.of, shape, generator=generator)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if arg.draw == "positive":
        return x.abs() + 0.5
    if arg.draw == "beyond":
        return x.abs() + 2.5
    if arg.draw == "unit":
        return 0.9 * torch.tanh(x)
    if arg.draw == "away":
        return x + 0.3 * torch.sign(x)
    if arg.draw == "truth":
        return (x > 0).double()
    if arg.draw == "ties":
        return torch.round(x).clamp(-1, 1)
    if arg.draw == "signs":
        return torch.sign(x) * (torch.arange(x.numel()) % 4 != 0)
    if arg.draw == "counts":
        return torch.round(x).abs()
    if arg.draw == "large":
        return 30.0 * x
    return x


def seen(arg: Arg, x: torch.Tensor) -> torch.Tensor:
    """The argument itself, from the dense array behind it: the views of `_views` in PyTorch."""
    if arg.draw == "winners":
        return F.max_pool2d(x, **_pool(arg.of[1]), return_indices=True)[1]
    if arg.layout == "permuted":
        return x.permute(tuple(range(x.dim()))[::-1])
    if arg.layout == "nhwc":
        return x.permute(0, 3, 1, 2)
    if arg.layout == "strided":
        return x[..., 1::2] if arg.shape else x[1]
    if arg.layout == "offset":
        return x[2 : 2 + arg.shape[0]]
    return x.expand(arg.shape) if arg.layout == "expanded" else x


def _views(b: Builder, arg: Arg, v: Value) -> Value:
    rank = len(v.shape)
    if arg.draw == "winners":
        return b.ops("max_pool", v, **arg.of[1])[1]
    if arg.layout == "permuted":
        return b.op("permute", v, dims=tuple(range(rank))[::-1])
    if arg.layout == "nhwc":
        return b.op("permute", v, dims=(0, 3, 1, 2))
    if arg.layout == "strided" and arg.shape:
        return b.op("slice", v, dim=rank - 1, start=1, stop=v.shape[-1], step=2)
    if arg.layout == "strided":
        return b.op("reshape", b.op("slice", v, dim=0, start=1, stop=2, step=1), shape=())
    if arg.layout == "offset":
        return b.op("slice", v, dim=0, start=2, stop=2 + arg.shape[0], step=1)
    return b.op("expand", v, shape=arg.shape) if arg.layout == "expanded" else v


def write(case: Case) -> Graph:
    """The case as a Graph: inputs ("arg", i), outputs "y<j>"."""
    b = Builder()
    args = []
    for i, arg in enumerate(case.args):
        if arg.draw == "const":
            args.append(b.const(arg.of))
            continue
        v = b.input("arg", str(i), _base(arg), "real" if _is_real(arg) else "int")
        args.append(_views(b, arg, v))
    out = b.ops(case.op, *args, **case.attrs)
    picked = range(len(out)) if case.outputs is None else case.outputs
    return b.finish({f"y{j}": out[j] for j in picked}, keep_inputs=True)


def reference(case: Case) -> Callable[..., Tensors]:
    """The case as a differentiable PyTorch function of the dense arrays behind its arguments."""

    def function(*dense: torch.Tensor) -> Tensors:
        args = [seen(a, x) for a, x in zip(case.args, dense, strict=True)]
        out = REFERENCE[case.op](*args, **case.attrs)
        out = out if isinstance(out, tuple) else (out,)
        picked = range(len(out)) if case.outputs is None else case.outputs
        return tuple(out[j] for j in picked)

    return function


# ---- what each op means ---------------------------------------------------------------------------


def _pool(a: dict[str, Any]) -> dict[str, Any]:
    return {
        "kernel_size": a["kernel"],
        "stride": a["stride"],
        "padding": a["padding"],
        "dilation": a["dilation"],
        "ceil_mode": a["ceil"],
    }


def _as_real(f: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *x: f(*x).to(x[0].dtype)


def _conv2d_dx(
    dy: torch.Tensor, w: torch.Tensor, size: Any, stride: Any, padding: Any, dilation: Any
) -> torch.Tensor:
    """The transpose of conv2d as a transposed convolution; rows that no window reached get zeros."""
    short = tuple(
        n - ((o - 1) * s - 2 * p + d * (k - 1) + 1)
        for n, o, s, p, d, k in zip(size, dy.shape[2:], stride, padding, dilation, w.shape[2:], strict=True)
    )
    # PyTorch asks for output_padding < max(stride, dilation); where it is larger the rest is zeros.
    whole = F.conv_transpose2d(dy, w, None, stride, (0, 0), (0, 0), 1, dilation)
    whole = F.pad(whole, (0, max(0, short[1] + padding[1]), 0, max(0, short[0] + padding[0])))
    return whole[:, :, padding[0] : padding[0] + size[0], padding[1] : padding[1] + size[1]]


def _conv2d_dw(
    x: torch.Tensor, dy: torch.Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any
) -> torch.Tensor:
    """The weight gradient as a convolution of x by dy: batch and channels swap, stride and dilation too."""
    dw = F.conv2d(x.transpose(0, 1), dy.transpose(0, 1), None, dilation, padding, stride).transpose(0, 1)
    return dw[:, :, : kernel[0], : kernel[1]]


def _standardize(x: torch.Tensor, dims: tuple[int, ...], eps: float) -> Tensors:
    mean = x.mean(dims, keepdim=True)
    var = ((x - mean) ** 2).mean(dims, keepdim=True)
    rstd = 1 / torch.sqrt(var + eps)
    return (x - mean) * rstd, _drop(rstd, dims), _drop(mean, dims), _drop(var, dims)


def _drop(stat: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    return stat.reshape([n for d, n in enumerate(stat.shape) if d not in dims])


def _keep(stat: torch.Tensor, like: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    return stat.reshape([1 if d in dims else n for d, n in enumerate(like.shape)])


def _project(v: torch.Tensor, xhat: torch.Tensor, rstd: torch.Tensor, dims: tuple[int, ...]) -> Tensors:
    corr = (v * xhat).mean(dims, keepdim=True)
    return (v - v.mean(dims, keepdim=True) - xhat * corr) * _keep(rstd, v, dims), _drop(corr, dims)


def _project_tangent(
    v: torch.Tensor,
    xhat: torch.Tensor,
    xhat_dot: torch.Tensor,
    rstd: torch.Tensor,
    corr_dot: torch.Tensor,
    dims: tuple[int, ...],
) -> torch.Tensor:
    """What P(v) moves by when x̂ does by xhat_dot and r by −r²·corr_dot: a derivative, so taken as one."""
    moved = torch.func.jvp(
        lambda x, r: _project(v, x, r, dims)[0], (xhat, rstd), (xhat_dot, -(rstd**2) * corr_dot)
    )
    return moved[1]


def _avg(x: torch.Tensor, a: dict[str, Any]) -> torch.Tensor:
    return F.avg_pool2d(
        x, a["kernel"], a["stride"], a["padding"], a["ceil"], a["count_include_pad"], a["divisor"] or None
    )


def _avg_adj(ct: torch.Tensor, size: Any, **a: Any) -> torch.Tensor:
    """The transpose of the matrix of avg_pool, written out."""
    unit = torch.eye(size[0] * size[1], dtype=ct.dtype).reshape(-1, 1, *size)
    matrix = _avg(unit, a).flatten(1)
    return (ct.flatten(2) @ matrix.T).reshape(*ct.shape[:2], *size)


def _max_pool(x: torch.Tensor, sign: torch.Tensor | None = None, **window: Any) -> Tensors:
    if sign is None:
        return F.max_pool2d(x, **window, return_indices=True)
    winners = F.max_pool2d(x * sign[:, None, None], **window, return_indices=True)[1]
    return _gather(x, winners), winners


def _gather(x: torch.Tensor, winners: torch.Tensor) -> torch.Tensor:
    return x.flatten(2).gather(2, winners.flatten(2)).reshape(winners.shape)


def _scatter(ct: torch.Tensor, winners: torch.Tensor, size: Any) -> torch.Tensor:
    hot = F.one_hot(winners.flatten(2), size[0] * size[1]).to(ct.dtype)
    return torch.einsum("ncpq,ncp->ncq", hot, ct.flatten(2)).reshape(*ct.shape[:2], *size)


def _one_hot(labels: torch.Tensor, classes: int, ignore_index: int, wraps: bool) -> torch.Tensor:
    labels = labels.long()
    kept = labels != ignore_index
    labels = labels % classes if wraps else labels
    return F.one_hot(labels.where(kept, torch.zeros_like(labels)), classes).double() * kept[:, None]


def _slice(x: torch.Tensor, dim: int, start: int, stop: int, step: int) -> torch.Tensor:
    return x.index_select(dim, torch.arange(start, stop, step))


def _pad(x: torch.Tensor, dim: int, start: int, stop: int, step: int, size: int) -> torch.Tensor:
    shape = list(x.shape)
    shape[dim] = size
    return torch.zeros(shape, dtype=x.dtype).index_add(dim, torch.arange(start, stop, step), x)


def _literal(data: bytes, shape: Shape) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float64).reshape(shape).clone()


_UNARY = ["neg", "exp", "log", "sqrt", "rsqrt", "square", "abs", "sign", "floor", "tanh", "sigmoid", "erf"]
_UNARY += ["expm1", "log1p", "sin", "cos", "atan", "relu"]
_BINARY = ["add", "sub", "mul", "div", "maximum", "minimum", "pow"]
_COMPARE = ["gt", "ge", "lt", "le", "eq", "ne"]

REFERENCE: dict[str, Callable[..., Any]] = {name: getattr(torch, name) for name in [*_UNARY, *_BINARY]}
REFERENCE |= {name: _as_real(getattr(torch, name)) for name in _COMPARE}
REFERENCE |= {
    "recip": torch.reciprocal,
    "softplus": lambda x: F.softplus(x, threshold=1e9),
    "step": _as_real(lambda x: x > 0),
    "where": lambda c, x, y: torch.where(c != 0, x, y),
    "const": lambda value: torch.tensor(value, dtype=torch.float64),
    "literal": _literal,
    "reshape": lambda x, shape: x.reshape(shape),
    "permute": lambda x, dims: x.permute(dims),
    "expand": lambda x, shape: x.expand(shape),
    "slice": _slice,
    "stop_gradient": lambda x: x.detach(),
    "pad": _pad,
    "concat": lambda *x, dim: torch.cat(x, dim),
    "sum": lambda x, dims: x.sum(dims),
    "amax": lambda x, dims: x.amax(dims),
    "cumsum": lambda x, dim, reverse: x.flip(dim).cumsum(dim).flip(dim) if reverse else x.cumsum(dim),
    "matmul": torch.matmul,
    "matmul_lanes": lambda x, y: (x[:, :, None] * y[None]).sum(1),
    "interleave": lambda x: x.clone(),
    "conv2d": lambda x, w, stride, padding, dilation: F.conv2d(x, w, None, stride, padding, dilation),
    "conv2d_dx": _conv2d_dx,
    "conv2d_dw": _conv2d_dw,
    "standardize": _standardize,
    "moments": lambda x, dims, eps: _standardize(x, dims, eps)[1:],
    "project": _project,
    "project_tangent": _project_tangent,
    "max_pool": lambda x, *sign, **a: _max_pool(x, *sign, **_pool(a)),
    "pool_gather": _gather,
    "pool_scatter": _scatter,
    "avg_pool": lambda x, **a: _avg(x, a),
    "avg_pool_adj": _avg_adj,
    "log_softmax": lambda x, dim: x - torch.logsumexp(x, dim, keepdim=True),
    "one_hot": _one_hot,
}

# ---- the table ------------------------------------------------------------------------------------

TAILS: tuple[Shape, ...] = ((), (1,), (17,), (3, 37), (2, 3, 5))


def _unary() -> list[Case]:
    draws = dict.fromkeys(("log", "sqrt", "rsqrt"), "positive") | {"recip": "away", "log1p": "unit"}
    names = [*_UNARY, "recip", "softplus", "step"]
    cases = []
    for name in names:
        draw = draws.get(name, "normal")
        cases += [Case(name, (Arg(s, draw=draw),)) for s in TAILS]
        cases += [Case(name, (Arg((5, 9), layout, draw),)) for layout in ("permuted", "strided", "expanded")]
    cases += [Case(name, (Arg((4, 7), draw="ties"),)) for name in ("abs", "sign", "step", "relu")]
    return cases + [
        Case(name, (Arg((67,), draw="large"),)) for name in ("tanh", "sigmoid", "softplus", "erf")
    ]


def _binary() -> list[Case]:
    pairs = (
        (Arg((7, 9)), Arg((9,))),
        (Arg((3, 1, 5)), Arg((2, 1))),
        (Arg(()), Arg((33,))),
        (Arg((10, 40)), Arg((10, 1))),
        (Arg((5, 9), "permuted"), Arg((5, 9), "strided")),
        (Arg((6, 4), "offset"), Arg((6, 4), "expanded")),
    )
    draws = {"div": ("normal", "away"), "pow": ("positive", "normal")}
    cases = []
    for name in [*_BINARY, *_COMPARE]:
        for pair in pairs:
            args = (
                Arg(a.shape, a.layout, d)
                for a, d in zip(pair, draws.get(name, ("normal", "normal")), strict=True)
            )
            cases.append(Case(name, tuple(args)))
        if name not in draws and name not in ("add", "sub", "mul"):
            cases.append(Case(name, (Arg((4, 9), draw="ties"), Arg((9,), draw="ties"))))
    x = Arg((3, 11), draw="ties")  # at zero too: 0·(1/0) must not become NaN
    cases += [Case("pow", (x, _const(c))) for c in (0.0, 1.0, 2.0, 3.0)]
    cases += [Case("pow", (Arg((3, 11), draw="counts"), Arg((11,), draw="beyond")))]
    cases += [Case("pow", (Arg((3, 11), draw="positive"), _const(c))) for c in (-1.0, 0.5, 2.5)]
    cases += [
        Case(name, (Arg((3, 11)), _const(c)))
        for name in ("add", "sub", "mul", "div")
        for c in (-1.0, 1.0, 0.3)
    ]
    cases += [
        Case(name, (_const(c), Arg((3, 11)))) for name in ("add", "sub", "mul") for c in (0.0, 1.0, -1.0)
    ]
    cases += [Case(name, (x, _const(0.0))) for name in ("maximum", "minimum", "gt", "le")]
    truth = Arg((5, 9), draw="truth")
    cases += [Case("where", (truth, Arg((5, 9)), Arg((9,)))), Case("where", (truth, Arg(()), Arg((5, 1))))]
    return cases + [Case("where", (Arg((5, 1), "expanded", "truth"), Arg((5, 9), "permuted"), Arg((5, 9))))]


def _const(number: float) -> Arg:
    return Arg((), draw="const", of=number)


def _shape() -> list[Case]:
    data = torch.linspace(-1, 1, 12, dtype=torch.float64).numpy().tobytes()
    cut = {"dim": 1, "start": 1, "stop": 8, "step": 3}
    return [
        Case("const", (), {"value": 0.3}),
        Case("literal", (), {"data": data, "shape": (3, 4)}),
        Case("reshape", (Arg((4, 6)),), {"shape": (2, 12)}),
        Case("reshape", (Arg((4, 6), "permuted"),), {"shape": (8, 3)}),
        Case("reshape", (Arg((1, 1)),), {"shape": ()}),
        Case("permute", (Arg((2, 3, 4)),), {"dims": (2, 0, 1)}),
        Case("permute", (Arg((2, 3, 4), "strided"),), {"dims": (1, 2, 0)}),
        Case("expand", (Arg((3, 1)),), {"shape": (2, 3, 5)}),
        Case("expand", (Arg(()),), {"shape": (7,)}),
        Case("slice", (Arg((3, 10)),), cut),
        Case("slice", (Arg((5, 4), "permuted"),), {"dim": 0, "start": 2, "stop": 5, "step": 1}),
        Case("slice", (Arg((5, 4)),), {"dim": 0, "start": 2, "stop": 2, "step": 1}),
        Case("stop_gradient", (Arg((3, 4)),)),
        Case("pad", (Arg((3, 3)),), {**cut, "size": 10}),
        Case("pad", (Arg((4, 3), "permuted"),), {"dim": 0, "start": 1, "stop": 5, "step": 1, "size": 9}),
        Case("concat", (Arg((2, 3)), Arg((4, 3), "strided"), Arg((1, 3))), {"dim": 0}),
        Case("concat", (Arg((2, 3), "permuted"), Arg((2, 5))), {"dim": 1}),
        Case("sum", (Arg((5, 37)),), {"dims": (0,)}),
        Case("sum", (Arg((5, 37)),), {"dims": (1,)}),
        Case("sum", (Arg((33, 7)),), {"dims": (0, 1)}),
        Case("sum", (Arg((2, 3, 4, 5)),), {"dims": (0, 2, 3)}),
        Case("sum", (Arg((2, 3, 4, 5), "permuted"),), {"dims": (1, 3)}),
        Case("sum", (Arg((4, 6), "expanded"),), {"dims": (0,)}),
        Case("sum", (Arg((1027,), "strided"),), {"dims": (0,)}),
        Case("matmul_lanes", (Arg((5, 7, 8)), Arg((7, 3, 8)))),
        Case("matmul_lanes", (Arg((5, 7, 16)), Arg((7, 3, 1)))),
        Case("matmul_lanes", (Arg((5, 1, 1)), Arg((1, 3, 4)))),
        Case("matmul_lanes", (Arg((6, 4, 3), "permuted"), Arg((4, 2, 3), "strided"))),
        Case("interleave", (Arg((5, 3, 4), "permuted"),)),
        Case("interleave", (Arg((7,), "strided"),)),
        Case("amax", (Arg((5, 37)),), {"dims": (0,)}),
        Case("amax", (Arg((33, 7), "permuted"),), {"dims": (1,)}),
        Case("amax", (Arg((2, 3, 4, 5), "permuted"),), {"dims": (1, 3)}),
        Case("amax", (Arg((6, 5), draw="ties"),), {"dims": (0,)}),
        Case("amax", (Arg((1027,), "strided"),), {"dims": (0,)}),
        Case("cumsum", (Arg((5, 37)),), {"dim": 0, "reverse": False}),
        Case("cumsum", (Arg((5, 37)),), {"dim": 1, "reverse": True}),
        Case("cumsum", (Arg((2, 3, 4, 5), "permuted"),), {"dim": 2, "reverse": False}),
        Case("cumsum", (Arg((1027,), "strided"),), {"dim": 0, "reverse": True}),
    ]


def _matmul() -> list[Case]:
    shapes = [
        ((3, 5), (5, 7)),
        ((10, 40), (40, 40)),
        ((10, 40), (40, 1)),
        ((1, 1), (1, 1)),
        ((17, 33), (33, 19)),
    ]
    shapes += [((4, 3, 5), (4, 5, 2)), ((2, 3, 4, 6), (2, 3, 6, 5))]
    cases = [Case("matmul", (Arg(p), Arg(q))) for p, q in shapes]
    layouts = [
        ("permuted", "dense"),
        ("dense", "permuted"),
        ("permuted", "permuted"),
        ("strided", "expanded"),
    ]
    return cases + [Case("matmul", (Arg((9, 11), p), Arg((11, 13), q))) for p, q in layouts]


def _geometry(stride: int = 1, padding: int = 0, dilation: int = 1) -> dict[str, tuple[int, int]]:
    return {"stride": (stride,) * 2, "padding": (padding,) * 2, "dilation": (dilation,) * 2}


def _conv() -> list[Case]:
    """x, w and geometry; y's shape follows, and the two adjoints are tested on the same."""
    table = [
        ((2, 3, 7, 6), (5, 3, 3, 3), _geometry(1, 1), "dense"),
        ((2, 1, 9, 9), (17, 1, 3, 3), _geometry(2, 1), "dense"),
        ((1, 4, 8, 7), (3, 4, 3, 3), _geometry(2, 0), "nhwc"),  # a last row and column that no window reaches
        ((3, 16, 5, 5), (16, 16, 1, 1), _geometry(1, 0), "nhwc"),
        ((2, 3, 9, 8), (4, 3, 5, 3), {"stride": (2, 1), "padding": (2, 1), "dilation": (1, 2)}, "dense"),
        ((2, 5, 4, 4), (6, 5, 4, 4), _geometry(1, 0), "dense"),
        ((2, 3, 7, 7), (18, 3, 2, 2), _geometry(3, 1), "permuted"),
    ]
    cases = []
    for x, w, geometry, layout in table:
        size, kernel = x[2:], w[2:]
        out = tuple(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(size, kernel, *geometry.values(), strict=True)
        )
        y = (x[0], w[0], *out)
        cases.append(Case("conv2d", (Arg(x, layout), Arg(w)), geometry))
        cases.append(Case("conv2d_dx", (Arg(y, layout), Arg(w)), {"size": size, **geometry}))
        cases.append(Case("conv2d_dw", (Arg(x, layout), Arg(y)), {"kernel": kernel, **geometry}))
    return cases


def _statistics() -> list[Case]:
    cases = []
    for shape, dims in (
        ((5, 3, 4, 2), (0, 2, 3)),
        ((7, 33), (1,)),
        ((3, 2, 9), (2,)),
        ((6, 5), (0,)),
        ((4, 3), (0, 1)),
    ):
        kept = tuple(n for d, n in enumerate(shape) if d not in dims)
        for layout in ("dense", "permuted"):
            x, eps = Arg(shape, layout), {"dims": dims, "eps": 1e-5}
            cases += [Case("standardize", (x,), eps), Case("standardize", (x,), eps, (0,)), Case("moments", (x,), eps)]
            stat = Arg(kept, draw="positive")
            cases += [Case("project", (x, Arg(shape), stat), {"dims": dims}, out) for out in (None, (0,))]
            cases.append(
                Case("project_tangent", (x, Arg(shape), Arg(shape), stat, Arg(kept)), {"dims": dims})
            )
    cases += [Case("standardize", (Arg((5, 4)),), {"dims": (0,), "eps": 1e-5}, (j,)) for j in (1, 2, 3)]
    return cases + [
        Case("project", (Arg((5, 4)), Arg((5, 4)), Arg((4,), draw="positive")), {"dims": (0,)}, (1,))
    ]


def _pools() -> list[Case]:
    def windows(
        kernel: int, stride: int, padding: int = 0, dilation: int = 1, ceil: bool = False
    ) -> dict[str, Any]:
        pairs = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
        return {k: (v, v) for k, v in pairs.items()} | {"ceil": ceil}

    cases = []
    settings = [
        ((2, 3, 6, 8), windows(2, 2)),
        ((1, 17, 7, 7), windows(2, 2)),
        ((2, 3, 7, 6), windows(3, 2, 1)),
    ]
    settings += [((2, 2, 7, 7), windows(3, 2, 0, 1, True)), ((2, 2, 9, 8), windows(2, 2, 1, 2))]
    for shape, attrs in settings:
        y = F.max_pool2d(torch.zeros(shape), **_pool(attrs)).shape
        winners = Arg(tuple(y), draw="winners", of=(shape, attrs))
        cases += [Case("max_pool", (Arg(shape, layout),), attrs, (0,)) for layout in ("dense", "nhwc")]
        cases.append(Case("max_pool", (Arg(shape, "nhwc"), Arg((shape[1],), draw="signs")), attrs, (0,)))
        cases.append(Case("pool_gather", (Arg(shape, "nhwc"), winners)))
        cases.append(Case("pool_scatter", (Arg(tuple(y), "nhwc"), winners), {"size": shape[2:]}))
    cases.append(Case("max_pool", (Arg((2, 3, 6, 6), draw="ties"),), windows(3, 2, 1), (0,)))
    average = [((2, 3, 6, 8), windows(2, 2), True, 0), ((2, 3, 7, 6), windows(3, 2, 1), True, 0)]
    average += [((2, 3, 7, 6), windows(3, 2, 1), False, 0), ((1, 2, 5, 5), windows(5, 5), True, 0)]
    average += [((2, 3, 7, 7), windows(3, 2, 0, 1, True), True, 0), ((2, 3, 6, 6), windows(2, 1), True, 3)]
    for shape, attrs, include, divisor in average:
        attrs = {k: v for k, v in attrs.items() if k != "dilation"}
        attrs |= {"count_include_pad": include, "divisor": divisor}
        y = _avg(torch.zeros(shape), attrs).shape
        cases += [Case("avg_pool", (Arg(shape, layout),), attrs) for layout in ("dense", "nhwc")]
        cases.append(Case("avg_pool_adj", (Arg(tuple(y)),), {"size": shape[2:], **attrs}))
    return cases


def _losses() -> list[Case]:
    cases = [
        Case("log_softmax", (Arg(s, layout),), {"dim": d})
        for s, layout, d in (
            ((7, 5), "dense", 1),
            ((7, 5), "permuted", 1),
            ((3, 4, 33), "dense", 2),
            ((5, 6, 7), "dense", 1),
            ((1, 1), "dense", 1),
        )
    ]
    cases.append(Case("log_softmax", (Arg((9, 11), draw="large"),), {"dim": 1}))
    cases += [
        Case("one_hot", (Arg((n,), layout, "labels", 5),), {"classes": 5, "ignore_index": i, "wraps": False})
        for n, layout, i in ((13, "dense", -100), (6, "strided", 2), (1, "dense", -100))
    ]
    cases += [
        Case("one_hot", (Arg((n,), layout, "truth"),), {"classes": 3, "ignore_index": i, "wraps": False})
        for n, layout, i in ((13, "dense", -100), (6, "strided", 1))
    ]
    return cases


CASES: tuple[Case, ...] = tuple(
    _unary() + _binary() + _shape() + _matmul() + _conv() + _statistics() + _pools() + _losses()
)
