"""The table of rules: small functions of arrays and labels, each written with aten ops that rules exist for."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class Case:
    """A function of real arrays of these shapes, and of labels of these (shape, classes)."""

    name: str
    f: Function
    shapes: tuple[tuple[int, ...], ...]
    labels: tuple[tuple[tuple[int, ...], int], ...] = ()
    make: Callable[[Tensor], Tensor] = field(default=lambda t: t)
    tolerance: float = 1e-11  # of gradients

    def __str__(self) -> str:
        return self.name

    def inputs(self, seed: int) -> dict[tuple[str, str], Tensor]:
        """Numbers, some of them on the kinks at 0, ±1 and 0.5."""
        g = torch.Generator().manual_seed(seed)
        made = {}
        for i, shape in enumerate(self.shapes):
            t = torch.randn(shape, dtype=torch.float64, generator=g)
            made["x", str(i)] = self.make(t)
        for i, (shape, classes) in enumerate(self.labels):
            made["y", str(i)] = torch.randint(0, classes, shape, generator=g)
        return made


def _positive(t: Tensor) -> Tensor:
    return t.abs() + 0.1


def _unit(t: Tensor) -> Tensor:
    return t.sigmoid()


def _kinks(t: Tensor) -> Tensor:
    """Round to eighths, and put the kinks of common functions among them."""
    t = (t * 16).round() / 8
    flat = t.reshape(-1)
    points = torch.tensor([0.0, 1.0, -1.0, 0.5, -0.5, 6.0, 3.0, -3.0, 25.0, -25.0], dtype=t.dtype)
    flat[: len(points)] = points[: flat.numel()]
    return t


def _infinite(t: Tensor) -> Tensor:
    """Kinks, and infinities of both signs."""
    t = _kinks(t)
    t.view(-1)[-2:] = torch.tensor([math.inf, -math.inf], dtype=t.dtype)
    return t


def _small_kinks(t: Tensor) -> Tensor:
    return _kinks(t).clamp(-4, 4)


def _ties(t: Tensor) -> Tensor:
    return (2 * t).round() / 2


CASES: list[Case] = []


def case(name: str, *shapes: tuple[int, ...], make: Callable[[Tensor], Tensor] = lambda t: t, **more: Any) -> Any:
    def enter(f: Function) -> Function:
        CASES.append(Case(name, f, shapes, make=make, **more))
        return f

    return enter


A, V, M = (3, 4), (4,), (4, 5)
IMAGE, CONV = (2, 3, 6, 6), (4, 3, 3, 3)

_SMOOTH_OR_NOT = ["neg", "exp", "square", "abs", "sign", "tanh", "sigmoid", "erf", "relu", "expm1", "sin", "cos"]
_SMOOTH_OR_NOT += ["atan", "floor", "ceil", "exp2", "erfc", "tan", "isnan", "isinf"]
for _n in _SMOOTH_OR_NOT:
    case(_n, A, make=_kinks)(lambda x, n=_n: getattr(torch, n)(x).double())
for _n in ("log", "sqrt", "rsqrt", "log1p", "reciprocal", "log2", "log10"):
    case(_n, A, make=_positive)(lambda x, n=_n: getattr(torch, n)(x))
for _n in ("maximum", "minimum", "add", "sub", "mul", "max", "min"):
    case(f"{_n}.ties", A, V, make=_kinks)(lambda x, y, n=_n: getattr(torch, n)(x, y))
for _n in ("gt", "ge", "lt", "le", "eq", "ne"):
    case(_n, A, V, make=_kinks)(lambda x, y, n=_n: torch.where(getattr(torch, n)(x, y), x, y * 2))
    case(f"{_n}.scalar", A, make=_kinks)(lambda x, n=_n: torch.where(getattr(torch, n)(x, 0.5), x, 3.0))

_ROUND = ["round", "trunc", "frac", "sinh", "cosh"]
for _n in _ROUND:
    case(_n, A, make=_small_kinks)(lambda x, n=_n: x * getattr(torch, n)(x))
case("round.halves", (2, 8))(lambda x: torch.round(torch.arange(-4.0, 4.0, 0.5, dtype=x.dtype).view(2, 8) + 0 * x))
case("hardswish", A, make=_kinks)(F.hardswish)
case("hardswish.infinite", A, make=_infinite)(F.hardswish)
case("logaddexp", A, V, make=_kinks)(torch.logaddexp)
case("logaddexp.inf", A, A)(
    lambda x, y: torch.logaddexp(torch.where(x > 0.5, -math.inf, x), torch.where(x < -0.5, -math.inf, y))
)
case("logit", A, make=_unit)(torch.logit)

for _n in ("amax", "amin"):
    case(_n, A, make=_ties)(lambda x, n=_n: getattr(x, n)(1))
    case(f"{_n}.dims", (3, 4, 5), make=_ties)(lambda x, n=_n: getattr(x, n)((0, -1), keepdim=True) * x)
    case(f"{_n}.all", A, make=_ties)(lambda x, n=_n: getattr(x, n)())
for _n in ("max", "min"):
    case(_n, A, make=_ties)(lambda x, n=_n: getattr(x, n)())
    case(f"{_n}.dim", (3, 4, 5), make=_ties)(lambda x, n=_n: getattr(x, n)(1)[0])
    case(f"{_n}.keepdim", (3, 4, 5), make=_ties)(lambda x, n=_n: getattr(x, n)(-1, keepdim=True).values * x)
    case(f"{_n}.nan", A)(lambda x, n=_n: getattr(torch.where(x > 1, math.nan, x), n)(1)[0])
    case(f"{_n}.number", ())(lambda x, n=_n: getattr(x * 2, n)(0)[0])
    case(f"{_n}.place", (3, 4, 5), make=_ties)(lambda x, n=_n: x.sum(1) * getattr(x, n)(1).indices)
for _n in ("argmax", "argmin"):
    case(_n, (3, 4, 5), make=_ties)(lambda x, n=_n: x * getattr(x, n)(1, keepdim=True))
    case(f"{_n}.all", A, make=_ties)(lambda x, n=_n: x * getattr(x, n)())
    case(f"{_n}.right", A, labels=(((3,), 4),))(lambda x, y, n=_n: x * (getattr(x, n)(1) == y).double().mean())
case("any_all", A, make=_ties)(
    lambda x: x * (x > 0).any(1, keepdim=True) + (x > 0).all(0).double() + x * (x > 9).any() + x**2 * (x < 9).all()
)
case("norm.inf", A, make=_ties)(lambda x: x.norm(math.inf, dim=1) + x.norm(-math.inf, dim=1) + x.norm(p=math.inf))
case("get_total_norm", A, V)(lambda x, y: x / torch.nn.utils.get_total_norm([x, y]))
case("unsafe_split", (3, 8))(lambda x: x.unsafe_chunk(3, 1)[2] * x.unsafe_split(2, 1)[1])
case("pixel_shuffle", (2, 12, 2, 3))(lambda x: F.pixel_shuffle(x, 2) ** 2)
case("channel_shuffle", (2, 6, 2, 3))(lambda x: F.channel_shuffle(x, 3)[:, 1:] ** 2)
case("interpolate", (2, 3, 2, 3))(lambda x: F.interpolate(x, scale_factor=(2, 3)) ** 2)
case("interpolate.1d", (2, 3, 4))(lambda x: F.interpolate(x, size=8) ** 2)

case("div", A, V, make=_positive)(lambda x, y: x / y)
case("div.scalars", A, make=_positive)(lambda x: 2.0 / x + x / 3)
case("add.alpha", A, V)(lambda x, y: torch.add(x, y, alpha=2.5))
case("sub.alpha", A, V)(lambda x, y: torch.sub(x, y, alpha=2.5))
case("rsub", A)(lambda x: 1.0 - x)
case("rsub.alpha", A, V)(lambda x, y: torch.rsub(x, y, alpha=3))
for _p in (0, 1, 2, 3, 4, 5):
    case(f"pow.{_p}", A, make=_kinks)(lambda x, p=_p: x**p)
for _q in (-2, -1, -0.5, 0.5, 1.5, 2.5):
    case(f"pow.{_q}", A, make=_positive)(lambda x, p=_q: x**p)
case("pow.tensor", A, V, make=_positive)(lambda x, y: x**y)
case("pow.scalar_base", A)(lambda x: 0.9**x)
case("pow.at_zero", A, V)(lambda x, y: (x * 0) ** (y * 0 + 2))
case("lerp", A, A, V)(lambda x, y, w: torch.lerp(x, y, w))
case("lerp.scalar", A, A)(lambda x, y: torch.lerp(x, y, 0.3))
case("addcmul", A, A, V)(lambda x, y, z: torch.addcmul(x, y, z, value=0.5))
case("addcdiv", A, A, V, make=_positive)(lambda x, y, z: torch.addcdiv(x, y, z, value=0.5))
case("xlogy", A, A, make=_positive)(lambda x, y: torch.xlogy(x, y))
case("xlogy.zero", A, A, make=_positive)(lambda x, y: torch.xlogy(x * 0, y))
case("clamp", A, make=_kinks)(lambda x: x.clamp(-0.5, 1.0))
case("clamp.min", A, make=_kinks)(lambda x: x.clamp(min=0.5))
case("clamp.max", A, make=_kinks)(lambda x: x.clamp(max=0.5))
case("clamp.crossed", A, make=_kinks)(lambda x: x.clamp(1.0, -1.0))
case("clamp.tensors", A, V)(lambda x, y: x.clamp(y, y + 1))
# Bounds that meet have a case of their own, not below them: up to 2.13 PyTorch loses the cotangent there.
case("clamp.kinks", A, V, (3, 1), make=_kinks)(lambda x, y, z: x.clamp(y, torch.where(y == z, z + 9, z)))
case("clamp.met", A, V, make=_kinks)(lambda x, y: (y.detach() + x.abs()).clamp(y, y * 1))
case("clamp.tensor_min", A, V, make=_kinks)(lambda x, y: x.clamp(min=y))
case("clamp.tensor_max", A, V, make=_kinks)(lambda x, y: x.clamp(max=y))
case("clamp.numbers_as_tensors", A, make=_kinks)(lambda x: x.clamp(torch.tensor(-0.5).to(x), torch.tensor(1.0).to(x)))
case("clamp_min", A, make=_kinks)(lambda x: x.clamp_min(0.5))
case("clamp_max", A, make=_kinks)(lambda x: x.clamp_max(0.5))
case("where", A, A, make=_kinks)(lambda x, y: torch.where(x > 0, x * y, y))
case("where.scalar", A, make=_kinks)(lambda x: torch.where(x > 0, 1.0, x))
case("where.safe", A, make=_kinks)(lambda x: torch.where(x > 0, torch.where(x > 0, x, 1.0).log(), 0.0))
case("masked_fill", A, make=_kinks)(lambda x: x.masked_fill(x > 0.5, -2.0))
case("masked_fill.tensor", A, (), make=_kinks)(lambda x, v: x.masked_fill(x > 0.5, v * 2))
case("logical", A, A, make=_kinks)(
    lambda x, y: torch.where((x > 0) & ~(y > 0) | ((x < -1) ^ (y > 2)), x, y) * torch.logical_not(x)
)
case("logical_and", A, A, make=_kinks)(
    lambda x, y: x * torch.logical_and(x, y) + y * torch.logical_or(x > 0, y) + torch.logical_xor(x, y)
)
case("bool.sum", A)(lambda x: x / ((x > 0).sum() + 1))
case("bool.any_arithmetic", A)(lambda x: x * (x > 0) + (x < 0).to(x.dtype) + (x < 1).double())
case("isfinite", A)(lambda x: torch.where(torch.isfinite(x / x.relu()), x, 0.5))

ACTIVATIONS: dict[str, Function] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 1.0),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "elu": lambda x: F.elu(x, 0.7),
    "selu": F.selu,
    "gelu": F.gelu,
    "gelu.tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "softplus": F.softplus,
    "softplus.beta": lambda x: F.softplus(x, 2.0, 5.0),
    "logsigmoid": F.logsigmoid,
    "softsign": F.softsign,
    "tanhshrink": F.tanhshrink,
    "hardshrink": F.hardshrink,
    "softshrink": F.softshrink,
    "threshold": lambda x: F.threshold(x, 0.5, -1.0),
    "glu": lambda x: F.glu(x, 1),
    "rrelu": lambda x: F.rrelu(x, training=False),
    "dropout.eval": lambda x: F.dropout(x, 0.5, training=False),
    "softmax": lambda x: F.softmax(x, 1),
    "softmax.0": lambda x: F.softmax(x, 0),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "softmin": lambda x: F.softmin(x, 1),
    "softmax.masked": lambda x: F.softmax(x.masked_fill(torch.eye(4, dtype=torch.bool)[:3], -math.inf), 1),
    "logsumexp": lambda x: x.logsumexp(1),
    "logsumexp.masked": lambda x: (x.masked_fill(torch.eye(4, dtype=torch.bool)[:3], -math.inf)).logsumexp(1, True),
}
for _n, _f in ACTIVATIONS.items():
    case(f"act.{_n}", A, make=_kinks)(_f)
# PyTorch's own backward of these rounds a coefficient (1/6, 1/α) to float32: 7e-9 and 9e-9 seen.
case("act.hardsigmoid", A, make=_kinks, tolerance=1e-7)(F.hardsigmoid)
case("act.celu", A, make=_kinks, tolerance=1e-7)(lambda x: F.celu(x, 0.7))
case("act.prelu", A, (1,), make=_kinks)(F.prelu)

# ---- shape ----------------------------------------------------------------------------------------------------

case("view", A)(lambda x: x.view(2, 6) * 2)
case("reshape.t", A)(lambda x: x.t().reshape(6, 2) * 2)
case("flatten", IMAGE)(lambda x: x.flatten(1).exp())
case("permute", IMAGE)(lambda x: x.permute(0, 2, 3, 1).contiguous().view(2, -1))
case("transpose", A)(lambda x: x.transpose(0, 1).exp().mT)
case("movedim", IMAGE)(lambda x: x.movedim(1, -1).exp())
case("expand", V)(lambda x: x.expand(3, 4).exp() + x.unsqueeze(1).expand(-1, 2).sum())
case("squeeze", (3, 1, 4))(lambda x: x.squeeze(1).exp().unsqueeze(0).squeeze())
case("cat", A, (2, 4))(lambda x, y: torch.cat([x, y, x * 2], 0))
case("cat.constant", A)(lambda x: torch.cat([x, torch.zeros(3, 2, dtype=x.dtype)], -1))
case("stack", A, A)(lambda x, y: torch.stack([x, y], 1) * torch.stack([y, x], -1).mT)
case("select", A)(lambda x: x[1] * x[:, -1, None][0])
case("slice", A)(lambda x: x[:, 1:3] * x[::2, :2].sum() + x[1:, ::3][0].sum())
case("split", A)(lambda x: sum(p.exp() for p in x.split(2, 1)))
case("chunk", A)(lambda x: torch.cat([p.sum(1, keepdim=True).exp() for p in x.chunk(3, 1)], 1))
case("unbind", A)(lambda x: sum(r.exp() * i for i, r in enumerate(x)))
case("narrow", A)(lambda x: x.narrow(1, 1, 2).exp())
case("unfold", (2, 7, 6))(lambda x: x.unfold(1, 3, 3).unfold(-2, 2, 2).exp())
case("unfold.overlapping", (2, 7))(lambda x: x.unfold(-1, 3, 2).exp() * x.unfold(1, 1, 2)[:, :3].sum())
case("unfold.apart", (7, 2))(lambda x: x.unfold(0, 2, 3).exp() + x[0, 0].unfold(0, 1, 1))
case("unfold.write", (2, 7))(lambda x: (lambda y: (y.unfold(1, 3, 3)[:, 1].exp_(), y)[-1])(x * 1))
case("repeat", A)(lambda x: x.repeat(2, 3, 1).exp())
case("tile", A)(lambda x: x.tile(2).exp())
case("repeat_interleave", A)(lambda x: x.repeat_interleave(2, 0).exp())
case("pad", IMAGE)(lambda x: F.pad(x, (1, 2, 0, 1)) * 2)
case("pad.value", A)(lambda x: F.pad(x, (1, -1), value=3.0).exp())
case("index.list", A)(lambda x: x[:, [2, 0, 3, 3]].exp() + x[[0, 1, 2]][:, [1]])
case("index.tensor", A)(lambda x: x[torch.tensor([[0, 2], [1, -1]])].exp())
case("index.bool", A)(lambda x: x[:, torch.tensor([True, False, True, True])].exp())
case("index_select", A)(lambda x: x.index_select(1, torch.arange(3, -1, -1)).exp())
case("flip", A)(lambda x: x.flip(1).exp() * x)
case("roll", A)(lambda x: x.roll(1, 1) * x + x.roll(5))
case("tril", A)(lambda x: x.tril().exp() + x.triu(1))
case("diagonal", (4, 4))(lambda x: x.diagonal().exp())
case("diagonal.offset", A)(lambda x: x.diagonal(1).exp() + x.diagonal(-1)[:2].sum() + x.diagonal(7).sum())
case("diagonal.dims", IMAGE)(lambda x: x.diagonal(-2, -1, 1).exp() * torch.ones(3, 4).t().diagonal().sum())
case("diagonal.write", A)(lambda x: (lambda y: (y.diagonal(1).mul_(2.0), y.t().diagonal().exp_(), y)[-1])(x * 1))
case("diag", (4, 4))(lambda x: torch.diag(x).exp() * torch.trace(x))
case("pad.reflect", IMAGE)(lambda x: F.pad(x, (2, 1, 0, 3), mode="reflect").exp())
case("pad.replicate", A)(lambda x: F.pad(x[None], (2, 1), mode="replicate").exp())
case("pad.circular", IMAGE)(lambda x: F.pad(x, (1, 2, 3, 0), mode="circular").exp())
case("index.points", IMAGE)(lambda x: x[:, [2, 0, 2], torch.tensor([[1], [4]])].exp())
case("index.apart", IMAGE)(lambda x: x[[1, 0], :, torch.tensor([-1, 2])].exp())
case("gather.constant", A)(
    lambda x: x.gather(1, torch.tensor([[3, 0], [1, 1]])).exp() + x.gather(0, torch.ones(1, 4).long())[0, :2]
)
case("logsumexp.dims", IMAGE)(lambda x: x.logsumexp((0, 2)) * x.logsumexp((1, -1), keepdim=True).sum())
case("mask.single", A, make=_kinks)(lambda x: x * (x > 0).float() + (x < 1).to(torch.uint8).float() * x)
case("where.single", A, make=_kinks)(
    lambda x: x * torch.where(x > 0, 0.1, 2.0) + torch.where(x > 0, 1.0, 0.0).masked_fill(x > 1, 0.25)
)
case("inplace.reshape", A)(lambda x: (x * 1).unsqueeze_(0).transpose_(1, 2).squeeze_(0).t_().exp())
case("trace", (4, 4))(lambda x: (x @ x).diagonal().sum())
case("gather.labels", A, labels=(((3,), 4),))(lambda x, y: x.gather(1, y[:, None]).exp())
case("index.labels", A, labels=(((3,), 4),))(lambda x, y: x[torch.arange(3), y].exp())
case("one_hot", A, labels=(((3,), 4),))(lambda x, y: (x * F.one_hot(y, 4)).sum(1).exp())
case("one_hot.matrix", (3, 2, 4), labels=(((3, 2), 4),))(lambda x, y: x * F.one_hot(y, 4).to(x.dtype))
case("labels.float", A, labels=(((3,), 4),))(lambda x, y: x * y.to(x.dtype)[:, None] + y.double().mean())
case("labels.eq", A, labels=(((3,), 4),))(
    lambda x, y: x * (y == 2).double()[:, None] + (y[:, None] == torch.arange(4)) * x
)
case("labels.both", A, labels=(((3,), 4),))(lambda x, y: F.cross_entropy(x, y) * (y + 1).double().sum())

# ---- sums -----------------------------------------------------------------------------------------------------

case("sum", A)(lambda x: x.exp().sum())
case("cumsum", IMAGE)(lambda x: x.exp().cumsum(-2) * x.cumsum(0))
case("cumsum.scalar", ())(lambda x: x.cumsum(0) * 2)
case("sum.dim", IMAGE)(lambda x: x.exp().sum((0, 2), keepdim=True) * x.sum(-1, keepdim=True))
case("mean", IMAGE)(lambda x: x.exp().mean() * x.mean((2, 3)) + x.mean([0, -1]).sum())
case("var", A)(lambda x: x.var() + x.var(1, unbiased=False) * x.var(0).sum())
case("std", A)(lambda x: x.std(1) * x.std(0, correction=0, keepdim=True).sum())
case("std.zero", A)(lambda x: (x * 0 + 1).std(1) + x.sum(1))
case("var_mean", A)(lambda x: sum(torch.var_mean(x, 1)))
case("std_mean", A)(lambda x: sum(torch.std_mean(x, 1, keepdim=True)))
case("norm", A)(lambda x: x.norm() * x.norm(dim=1) + torch.linalg.vector_norm(x, dim=1, keepdim=True).sum())
case("norm.1", A)(lambda x: x.norm(p=1, dim=0))
case("norm.zero", A)(lambda x: x.relu().mul(0).norm(dim=1) + x.sum(1))
case("normalize", A)(lambda x: F.normalize(x, dim=1))
case("cosine", A, A)(lambda x, y: F.cosine_similarity(x, y))
case("pairwise_distance", A, A)(lambda x, y: F.pairwise_distance(x, y))
case("cdist", (3, 4), (2, 4))(lambda x, y: torch.cdist(x, y))
case("cdist.1", (3, 4), (2, 4))(lambda x, y: torch.cdist(x, y, p=1))

# ---- products -------------------------------------------------------------------------------------------------

case("mm", A, M)(lambda x, y: x @ y)
case("addmm", A, M, (5,))(lambda x, y, b: torch.addmm(b, x, y, beta=0.5, alpha=2))
case("addmm.beta0", A, M, (5,))(lambda x, y, b: torch.addmm(b, x, y, beta=0))
case("bmm", (2, 3, 4), (2, 4, 5))(lambda x, y: torch.bmm(x, y))
case("baddbmm", (2, 3, 4), (2, 4, 5), (3, 5))(lambda x, y, b: torch.baddbmm(b, x, y, beta=2, alpha=0.5))
case("matmul.broadcast", (2, 3, 4), M)(lambda x, y: x @ y)
case("matmul.batch", (2, 1, 3, 4), (3, 4, 5))(lambda x, y: x @ y)
case("mv", A, V)(lambda x, y: x @ y)
case("vm", (3,), A)(lambda x, y: x @ y)
case("addmv", (3,), A, V)(lambda b, x, y: torch.addmv(b, x, y, beta=0.5))
case("dot", V, V)(lambda x, y: x @ y)
case("outer", V, V)(lambda x, y: torch.outer(x, y))
case("linear", A, (5, 4), (5,))(F.linear)
case("linear.3d", (2, 3, 4), (5, 4), (5,))(F.linear)
case("linear.nobias", (2, 3, 4), (5, 4))(F.linear)
case("bilinear", A, A, (2, 4, 4))(lambda x, y, w: F.bilinear(x, y, w))
case("einsum", A, (5, 4))(lambda x, y: torch.einsum("nk,mk->nm", x, y))
case("einsum.batch", (2, 3, 4), (2, 5, 4))(lambda x, y: torch.einsum("bik,bjk->bij", x, y))
case("einsum.trace", A, A)(lambda x, y: torch.einsum("ij,ij->", x, y))
case("conv2d", IMAGE, CONV, (4,))(lambda x, w, b: F.conv2d(x, w, b, padding=1))
case("conv2d.stride", IMAGE, CONV)(lambda x, w: F.conv2d(x, w, stride=(2, 1), padding=(0, 1), dilation=(1, 2)))
case("conv2d.same", IMAGE, (4, 3, 3, 5))(lambda x, w: F.conv2d(x, w, padding="same"))
case("conv2d.single", (3, 6, 6), CONV, (4,))(F.conv2d)
case("conv2d.groups", (2, 4, 5, 6), (6, 2, 3, 2), (6,))(lambda x, w, b: F.conv2d(x, w, b, 2, 1, groups=2))
case("conv2d.depthwise", (2, 3, 5, 6), (3, 1, 3, 2), (3,))(
    lambda x, w, b: F.conv2d(x, w, b, stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=3)
)
case("conv2d.depthwise.wider", (3, 5, 6), (6, 1, 2, 3))(lambda x, w: F.conv2d(x, w, groups=3))
case("conv1d.groups", (2, 4, 7), (4, 2, 3))(lambda x, w: F.conv1d(x, w, stride=2, padding=1, groups=2))
case("conv1d.depthwise", (2, 4, 7), (4, 1, 3))(lambda x, w: F.conv1d(x, w, padding=2, dilation=2, groups=4))
case("conv1d", (2, 3, 7), (4, 3, 3), (4,))(lambda x, w, b: F.conv1d(x, w, b, stride=2, padding=1))
case("attention", (1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4))(F.scaled_dot_product_attention)
case("attention.single", A, A, A)(F.scaled_dot_product_attention)
case("attention.three_dims", (2, 3, 4), (2, 5, 4), (2, 5, 4))(F.scaled_dot_product_attention)
for _s in ((2, 3, 4), (1, 2, 3, 4)):  # which of them PyTorch takes to its flash kernel depends on its version
    case(f"attention.to_nothing.{len(_s)}", _s, _s, _s)(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(3, 3).tril(-1).bool())
    )
case("attention.causal", (1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3, 4))(
    lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
)

# ---- normalisation and pooling --------------------------------------------------------------------------------

case("batch_norm", IMAGE, (3,), (3,))(lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True))
case("batch_norm.2d", (5, 3), (3,))(lambda x, w: F.batch_norm(x, None, None, w, training=True))
case("batch_norm.eval", IMAGE, (3,), (3,))(lambda x, m, v: F.batch_norm(x, m.detach(), v.detach().square() + 0.5))
case("layer_norm", IMAGE, (6, 6), (6, 6))(lambda x, w, b: F.layer_norm(x, (6, 6), w, b))
case("layer_norm.plain", A)(lambda x: F.layer_norm(x, (4,)))
case("group_norm", (2, 4, 3, 3), (4,), (4,))(lambda x, w, b: F.group_norm(x, 2, w, b))
case("group_norm.plain", (2, 4, 5))(lambda x: F.group_norm(x, 2))
case("instance_norm", IMAGE, (3,), (3,))(lambda x, w, b: F.instance_norm(x, weight=w, bias=b))
case("rms_norm", A, V)(lambda x, w: F.rms_norm(x, (4,), w, eps=1e-6))
case("max_pool2d", IMAGE)(lambda x: F.max_pool2d(x, 2))
case("max_pool2d.pad", IMAGE)(lambda x: F.max_pool2d(x, 3, 2, 1, ceil_mode=True))
case("max_pool2d.single", (3, 6, 6))(lambda x: F.max_pool2d(x, (3, 2), dilation=(1, 2)))
case("max_pool2d.relu", IMAGE, make=_kinks)(lambda x: F.max_pool2d(F.relu(x), 2))
case("max_pool2d.overlapping", IMAGE, make=_kinks)(lambda x: F.max_pool2d(F.relu(x), 3, 2, 1) * 2)
case("max_pool2d.affine", IMAGE, (3,), (3,), make=_kinks)(
    lambda x, w, b: F.max_pool2d(F.relu(x * w[:, None, None] + b[:, None, None]), 2)
)
case("max_pool2d.batch_norm", (2, 3, 7, 6), (3,), (3,))(
    lambda x, w, b: F.max_pool2d(F.relu(F.batch_norm(x, None, None, w, b, training=True)), 2)
)
case("max_pool2d.batch_norm.eval", IMAGE, (3,), (3,))(
    lambda x, w, v: F.max_pool2d(F.batch_norm(x, v.detach(), v.detach().square() + 0.5, w).tanh(), 3, 2)
)
case("max_pool2d.falling", IMAGE, (3, 1, 1))(lambda x, c: F.max_pool2d(1 - torch.sigmoid(-2 * x) * (-c).exp() - c, 2))
case("max_pool2d.skip", IMAGE, IMAGE, (2, 3, 1, 1))(lambda x, y, w: F.max_pool2d(F.relu(x * w + y), 2))
case("max_pool1d", (2, 3, 6))(lambda x: F.max_pool1d(x, 2))
case("adaptive_max_pool2d", IMAGE)(lambda x: F.adaptive_max_pool2d(x, (3, 2)))
case("adaptive_max_pool2d.left", (2, 3, 7, 5))(lambda x: F.adaptive_max_pool2d(x, (3, 4)))
case("avg_pool2d", IMAGE)(lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False))
case("avg_pool2d.ceil", IMAGE)(lambda x: F.avg_pool2d(x, 4, ceil_mode=True, divisor_override=3))
case("avg_pool1d", (2, 3, 6))(lambda x: F.avg_pool1d(x, 2))
case("adaptive_avg_pool2d.1", IMAGE)(lambda x: F.adaptive_avg_pool2d(x, 1))
case("adaptive_avg_pool2d", IMAGE)(lambda x: F.adaptive_avg_pool2d(x, (2, 3)))
case("adaptive_avg_pool2d.left", (3, 7, 9))(lambda x: F.adaptive_avg_pool2d(x, (2, 4)))
case("adaptive_avg_pool1d.left", (2, 3, 7))(lambda x: F.adaptive_avg_pool1d(x, 6))

# ---- losses ---------------------------------------------------------------------------------------------------

_L = (((3,), 4),)


def _batch(reduction: str) -> str:
    return "batchmean" if reduction == "mean" else reduction  # PyTorch warns of the other


for _r in ("mean", "sum", "none"):
    case(f"cross_entropy.{_r}", A, labels=_L)(lambda x, y, r=_r: F.cross_entropy(x, y, reduction=r))
    case(f"cross_entropy.weight.{_r}", A, V, labels=_L)(
        lambda x, w, y, r=_r: F.cross_entropy(x, y, w.exp().detach(), reduction=r)
    )
    case(f"cross_entropy.ignore.{_r}", A, labels=_L)(
        lambda x, y, r=_r: F.cross_entropy(x, y, ignore_index=1, reduction=r)
    )
    case(f"cross_entropy.smooth.{_r}", A, labels=_L)(
        lambda x, y, r=_r: F.cross_entropy(x, y, label_smoothing=0.2, ignore_index=1, reduction=r)
    )
    case(f"cross_entropy.smooth.weight.{_r}", A, V, labels=_L)(
        lambda x, w, y, r=_r: F.cross_entropy(x, y, w.exp().detach(), label_smoothing=0.2, ignore_index=1, reduction=r)
    )
    case(f"cross_entropy.probabilities.{_r}", A, A, V)(
        lambda x, p, w, r=_r: F.cross_entropy(x, p.softmax(1), w.exp().detach(), label_smoothing=0.1, reduction=r)
    )
    case(f"nll.{_r}", A, labels=_L)(lambda x, y, r=_r: F.nll_loss(x.log_softmax(1), y, reduction=r))
    case(f"mse.{_r}", A, A)(lambda x, y, r=_r: F.mse_loss(x, y, reduction=r))
    case(f"l1.{_r}", A, A, make=_kinks)(lambda x, y, r=_r: F.l1_loss(x, y, reduction=r))
    case(f"smooth_l1.{_r}", A, V, make=_kinks)(
        lambda x, y, r=_r: F.smooth_l1_loss(x, y.expand_as(x), reduction=r, beta=0.5)
    )
    case(f"smooth_l1.{_r}.infinite", A, make=_infinite)(
        lambda x, r=_r: F.smooth_l1_loss(x, torch.ones_like(x), reduction=r)
    )
    case(f"huber.{_r}.infinite", A, make=_infinite)(lambda x, r=_r: F.huber_loss(x, torch.ones_like(x), reduction=r))
    case(f"huber.{_r}", A, A, make=_kinks)(lambda x, y, r=_r: F.huber_loss(x, y, reduction=r, delta=0.5))
    case(f"bce_logits.{_r}", A, A, A, V)(
        lambda x, y, w, p, r=_r: F.binary_cross_entropy_with_logits(
            x, y.sigmoid(), w.detach(), pos_weight=p.exp().detach(), reduction=r
        )
    )
    case(f"bce.{_r}", A, A, A)(
        lambda x, y, w, r=_r: F.binary_cross_entropy(x.sigmoid(), y.sigmoid(), w.detach(), reduction=r)
    )
    case(f"kl.{_r}", A, A)(lambda x, y, r=_r: F.kl_div(x.log_softmax(1), y.softmax(1), reduction=_batch(r)))
    case(f"kl.log.{_r}", A, A)(
        lambda x, y, r=_r: F.kl_div(x.log_softmax(1), y.log_softmax(1), reduction=_batch(r), log_target=True)
    )
case("bce_logits.plain", A, A, make=_kinks)(lambda x, y: F.binary_cross_entropy_with_logits(x, (y > 0).to(x.dtype)))
case("bce.saturated", A, A, make=_kinks)(
    lambda x, y: F.binary_cross_entropy(x.clamp(0, 1), (y > 0).to(x.dtype), reduction="sum")
)
case("cross_entropy.one_dim", V, labels=(((), 4),))(F.cross_entropy)
case("cross_entropy.image", (2, 4, 3, 3), labels=(((2, 3, 3), 4),))(F.cross_entropy)
case("cross_entropy.image.smooth", (2, 4, 3, 3), labels=(((2, 3, 3), 4),))(
    lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1)
)
case("cross_entropy.infinite", A, labels=_L)(
    lambda x, y: F.cross_entropy(torch.cat([x, torch.full((3, 1), -math.inf, dtype=x.dtype)], 1), y)
)
case("soft_margin", A, A)(lambda x, y: F.soft_margin_loss(x, y.sign().detach()))
case("poisson", A, A, make=_positive)(lambda x, y: F.poisson_nll_loss(x, y))
case("hinge_embedding", A, A, make=_kinks)(lambda x, y: F.hinge_embedding_loss(x, y.sign()))
case("margin_ranking", A, A, A)(lambda x, y, z: F.margin_ranking_loss(x, y, z.sign()))
case("triplet", A, A, A)(F.triplet_margin_loss)

# ---- writing in place -----------------------------------------------------------------------------------------


@case("inplace.add", A, V)
def _(x: Tensor, y: Tensor) -> Tensor:
    h = x * 2
    h.add_(y, alpha=3)
    h *= y
    h -= 1
    return h.div_(2)


@case("inplace.relu", A, make=_kinks)
def _(x: Tensor) -> Tensor:
    return F.silu(F.relu(x * 2, inplace=True) + 1, inplace=True)


@case("inplace.old_view", A)
def _(x: Tensor) -> Tensor:
    h = x * 2
    row, column = h[0], h.t()[1]
    h.exp_()
    return row * column.sum() + h.sum()


@case("inplace.through_view", A, (3,))
def _(x: Tensor, y: Tensor) -> Tensor:
    h = x * 2
    h[:, 0] = y
    h[1:, 1:3] *= 2
    h[0, 2] += 1
    h.view(2, 6)[1, ::2] = 0.5
    h.t()[3].mul_(y)
    return h * x


@case("inplace.nested_views", A)
def _(x: Tensor) -> Tensor:
    h = x + 0
    part = h[1:]
    inner = part[:, ::2]
    before = inner * 1
    h.mul_(2)
    inner.add_(before)
    part[0].sigmoid_()
    return torch.cat([h, inner.sum(1, keepdim=True).expand(2, 4)])


@case("inplace.masked", A, make=_kinks)
def _(x: Tensor) -> Tensor:
    h = x * 1
    h.masked_fill_(x > 0, 0.25)
    h.clamp_(min=-1.0).neg_()
    h[0].zero_()
    h[1].fill_(2.0)
    return h


@case("inplace.into_zeros", A, (3,))
def _(x: Tensor, y: Tensor) -> Tensor:
    out = torch.zeros(3, 6, dtype=x.dtype)
    half = out[:, :4]
    half.copy_(x)
    out[:, 4] = y
    out.diagonal()[2:].add_(y[0])
    for i in range(3):
        out[i, 5] = x[i].sum()
    return out * half.sum()


@case("inplace.empty", A)
def _(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out.copy_(x[0])
    buffer = x.new_empty(3, 2).fill_(1.0)
    return out.exp() + buffer.sum()


@case("inplace.split", A)
def _(x: Tensor) -> Tensor:
    h = x * 1
    left, right = h.chunk(2, 1)
    left = left * 1
    right = right.exp()
    h.unbind(0)
    return left * right + h[:, :2]


@case("inplace.constants", A)
def _(x: Tensor) -> Tensor:
    mask = torch.ones(3, 4)
    mask[1] = 0
    mask.tril_()
    early = x + mask
    mask.add_(1)
    return early * (x + mask)


# ---- constants, detach, regions without gradient --------------------------------------------------------------


@case("factories", A)
def _(x: Tensor) -> Tensor:
    n = torch.arange(4, dtype=x.dtype)
    causal = torch.tril(torch.ones(3, 4)) == 0
    table = torch.stack([torch.sin(n), torch.cos(n)]).sum(0)
    y = x.masked_fill(causal, -1.0) + table + torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=x.dtype)
    return y * torch.eye(3, 4, dtype=x.dtype) + torch.full_like(x, 2.0) + x.new_ones(4) + torch.linspace(0, 1, 4)


@case("constants.read", A)
def _(x: Tensor) -> Tensor:
    scales = torch.tensor([1.0, 2.0, 3.0])
    for s in scales.tolist():
        x = x * s
    return x[: int(scales.argmax())] if bool(scales.sum() > 1) else x


@case("detach", A)
def _(x: Tensor) -> Tensor:
    h = x.exp()
    return h * h.detach() + (x - x.detach())


@case("no_grad", A)
def _(x: Tensor) -> Tensor:
    h = x.exp()
    with torch.no_grad():
        centre = h.mean(1, keepdim=True)
        scale = centre * 2
        scale += 1
        view = h[0]
    return (h - centre) * scale + view


@case("detach.write", A)
def _(x: Tensor) -> Tensor:
    h = x * 2
    h.detach().add_(1)
    h.detach()[:, 1].zero_()
    return h * 1


@case("no_grad.write", A)
def _(x: Tensor) -> Tensor:
    h = x * 2
    with torch.no_grad():
        h.clamp_(min=0.5)
        h[0] = 3.0
    return h * 1


@case("straight_through", A, make=_kinks)
def _(x: Tensor) -> Tensor:
    return x + (x.floor() - x).detach()


@case("dead.unsupported", A)
def _(x: Tensor) -> Tensor:
    best = x.argsort(1)
    x.cumsum(0).median()
    (best == 0).float().mean()
    h = x * 1
    h.cumprod(0)
    return h.exp()


@case("python_branch_on_shape", A)
def _(x: Tensor) -> Tensor:
    return x * 2 if x.shape[0] > 2 and x.dim() == 2 and x.is_contiguous() else x


@case("vmap", A)
def _(x: Tensor) -> Tensor:
    return torch.vmap(lambda row: (row * 2).exp().sum() * row)(x)


@case("same_dtype", A)
def _(x: Tensor) -> Tensor:
    return x.to(torch.float64).type_as(x).double().to(x.device) * torch.tensor(2) + torch.tensor(0.5)
