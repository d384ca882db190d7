"""Rules for arithmetic, comparison and choice, element by element, and for activations.

At a kink each rule picks the side whose derivative PyTorch's backward uses; a branch that was not taken is computed on
a harmless value, so that it cannot turn a zero cotangent into 0·∞.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

from metafast.graph import Value
from metafast.normalise.table import Context, rule
from metafast.normalise.views import Stop

_SAME_NAME = "neg exp log sqrt rsqrt square abs sign tanh sigmoid erf relu expm1 log1p sin cos atan floor"
_SAME_NAME += " maximum minimum gt ge lt le eq ne"
_OTHER_NAME = {"reciprocal": "recip", "sgn": "sign", "max.other": "maximum", "min.other": "minimum"}


def _enter_direct(aten: str, op: str) -> None:
    @rule(aten)
    def direct(c: Context, *x: Any) -> Value:
        return c(op, *x)


for _aten, _op in {**{n: n for n in _SAME_NAME.split()}, **_OTHER_NAME}.items():
    _enter_direct(_aten, _op)


# ---- arithmetic -----------------------------------------------------------------------------------------------


@rule("add")
def _add(c: Context, x: Any, y: Any, *, alpha: float = 1) -> Value:
    if c.out[0].dtype == torch.bool:
        return c("maximum", x, y)
    return c("add", x, c("mul", y, alpha))


@rule("sub", "subtract")
def _sub(c: Context, x: Any, y: Any, *, alpha: float = 1) -> Value:
    return c("sub", x, c("mul", y, alpha))


@rule("rsub")
def _rsub(c: Context, x: Any, y: Any, alpha: float = 1) -> Value:
    return c("sub", y, c("mul", x, alpha))


@rule("mul", "multiply")
def _mul(c: Context, x: Any, y: Any) -> Value:
    return c("mul", x, y)


@rule("div", "divide", "true_divide")
def _div(c: Context, x: Any, y: Any, *, rounding_mode: str | None = None) -> Value:
    if rounding_mode is not None:
        raise c.refuse(f"division with rounding_mode={rounding_mode!r} has no native form")
    return c("div", x, y)


@rule("pow")
def _pow(c: Context, x: Any, y: Any) -> Value:
    number = y if isinstance(y, (int, float)) else None
    if number in (0.5, -0.5, -1):
        return c({0.5: "sqrt", -0.5: "rsqrt", -1: "recip"}[float(number)], x)
    if number == 3:
        return c("mul", c("square", x), x)
    if number == 4:
        return c("square", c("square", x))
    return c("pow", x, y)


@rule("ceil")
def _ceil(c: Context, x: Any) -> Value:
    return c("neg", c("floor", c("neg", x)))


@rule("round")
def _round(c: Context, x: Any, *, decimals: int = 0) -> Value:
    """To the nearest whole number, halves to the even one; x − ⌊x⌋ is exact."""
    if decimals:
        raise c.refuse("rounding to decimals has no native form")
    below = c("floor", x)
    rest = c("sub", x, below)
    odd = c("ne", c("mul", c("floor", c("mul", below, 0.5)), 2.0), below)
    return c("add", below, c("maximum", c("gt", rest, 0.5), c("mul", c("eq", rest, 0.5), odd)))


@rule("trunc", "fix")
def _trunc(c: Context, x: Any) -> Value:
    return c("mul", c("sign", x), c("floor", c("abs", x)))


@rule("frac")
def _frac(c: Context, x: Any) -> Value:
    return c("sub", x, _trunc(c, x))


@rule("sinh")
def _sinh(c: Context, x: Any) -> Value:
    """½(e^x − e^−x) through expm1, exact near 0."""
    return c("mul", c("sub", c("expm1", x), c("expm1", c("neg", x))), 0.5)


@rule("cosh")
def _cosh(c: Context, x: Any) -> Value:
    return c("mul", c("add", c("exp", x), c("exp", c("neg", x))), 0.5)


@rule("logaddexp")
def _logaddexp(c: Context, x: Any, y: Any) -> Value:
    """Infinitely far apart, or both infinite, it is the greater."""
    apart = c("sub", x, y)
    near = c("lt", c("abs", apart), math.inf)
    sum_ = c("add", y, c("softplus", c("where", near, apart, 0.0)))
    return c("where", near, sum_, c("maximum", x, y))


@rule("logit")
def _logit(c: Context, x: Any, eps: float | None = None) -> Value:
    if eps is not None:
        raise c.refuse("logit with eps has no native form")
    return c("sub", c("log", x), c("log1p", c("neg", x)))


@rule("tan")
def _tan(c: Context, x: Any) -> Value:
    return c("div", c("sin", x), c("cos", x))


@rule("exp2")
def _exp2(c: Context, x: Any) -> Value:
    return c("exp", c("mul", x, math.log(2.0)))


@rule("log2")
def _log2(c: Context, x: Any) -> Value:
    return c("mul", c("log", x), 1.0 / math.log(2.0))


@rule("log10")
def _log10(c: Context, x: Any) -> Value:
    return c("mul", c("log", x), 1.0 / math.log(10.0))


@rule("erfc")
def _erfc(c: Context, x: Any) -> Value:
    return c("sub", 1.0, c("erf", x))


@rule("xlogy")
def _xlogy(c: Context, x: Any, y: Any) -> Value:
    nought = c("mul", c("eq", x, 0.0), c("le", y, 0.0))
    return c("mul", x, c("log", c("where", nought, 1.0, y)))


@rule("lerp")
def _lerp(c: Context, start: Any, end: Any, weight: Any) -> Value:
    return c("add", start, c("mul", weight, c("sub", end, start)))


@rule("addcmul")
def _addcmul(c: Context, x: Any, y: Any, z: Any, *, value: float = 1) -> Value:
    return c("add", x, c("mul", value, c("mul", y, z)))


@rule("addcdiv")
def _addcdiv(c: Context, x: Any, y: Any, z: Any, *, value: float = 1) -> Value:
    return c("add", x, c("mul", value, c("div", y, z)))


# ---- truth values ---------------------------------------------------------------------------------------------


def _truth(c: Context, x: Any) -> Value:
    return c("ne", x, 0.0)


@rule("logical_and")
def _and(c: Context, x: Any, y: Any) -> Value:
    return c("mul", _truth(c, x), _truth(c, y))


@rule("logical_or")
def _or(c: Context, x: Any, y: Any) -> Value:
    return c("maximum", _truth(c, x), _truth(c, y))


@rule("logical_xor")
def _xor(c: Context, x: Any, y: Any) -> Value:
    return c("ne", _truth(c, x), _truth(c, y))


@rule("logical_not")
def _not(c: Context, x: Any) -> Value:
    return c("eq", x, 0.0)


def _enter_bitwise(name: str, of_bools: Callable[..., Value]) -> None:
    @rule(name)
    def bitwise(c: Context, *x: Any) -> Value:
        if c.out[0].dtype != torch.bool:
            raise c.refuse("bitwise operations on integers have no native form")
        return of_bools(c, *x)


_OF_BOOLS: dict[str, Callable[..., Value]] = {"and": _and, "or": _or, "xor": _xor, "not": _not}
for _name, _rule in _OF_BOOLS.items():
    _enter_bitwise(f"bitwise_{_name}", _rule)
    _enter_bitwise(f"__{_name}__", _rule)


@rule("isnan")
def _isnan(c: Context, x: Any) -> Value:
    return c("ne", x, x)


@rule("isinf")
def _isinf(c: Context, x: Any) -> Value:
    return c("eq", c("abs", x), math.inf)


@rule("isfinite")
def _isfinite(c: Context, x: Any) -> Value:
    return c("lt", c("abs", x), math.inf)


# ---- choice ---------------------------------------------------------------------------------------------------


@rule("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar")
def _where(c: Context, condition: Any, x: Any, y: Any) -> Value:
    return c("where", condition, x, y)


@rule("masked_fill")
def _masked_fill(c: Context, x: Any, mask: Any, value: Any) -> Value:
    return c("where", mask, value, x)


@functools.cache
def _share_at_bound(tensor: bool) -> float:
    """The part of a cotangent that `clamp` passes to x where x is at its bound, a number or a tensor.

    PyTorch itself is asked, for it changed its mind: 1 up to 2.13, the subgradient of least norm since (0 at a number,
    ½ at a tensor; pytorch/pytorch#191142).
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.zeros((), device="cpu", requires_grad=True)
        bound = torch.zeros((), device="cpu") if tensor else 0.0
        return torch.autograd.grad(torch.clamp(x, min=bound), x)[0].item()


@rule("clamp", "clip")
def _clamp(c: Context, x: Any, min: Any = None, max: Any = None) -> Value:
    share = _share_at_bound(not isinstance(min if max is None else max, (int, float)))
    if share == 0.5:
        return _even_clamp(c, x, min, max)
    below, above = ("lt", "gt") if share else ("le", "ge")
    y = c.real(x)
    if min is not None:
        y = c("where", c(below, y, min), min, y)
    if max is not None:
        y = c("where", c(above, y, max), max, y)
    return y


def _even_clamp(c: Context, x: Any, min: Any, max: Any) -> Value:
    """Where x is at a bound, both have half of the cotangent; where the bounds meet, one of the three has it whole."""
    low = x if min is None else c("maximum", x, min)
    y = low if max is None else c("minimum", low, max)
    if min is None or max is None:
        return y
    met = c("where", c("lt", x, min), min, c("where", c("gt", x, max), max, x))
    return c("where", c("eq", min, max), met, y)


@rule("clamp_min")
def _clamp_min(c: Context, x: Any, min: Any) -> Value:
    return _clamp(c, x, min=min)


@rule("clamp_max")
def _clamp_max(c: Context, x: Any, max: Any) -> Value:
    return _clamp(c, x, max=max)


@rule("threshold")
def _threshold(c: Context, x: Any, threshold: float, value: float) -> Value:
    return c("where", c("le", x, threshold), value, x)


# ---- activations ----------------------------------------------------------------------------------------------


@rule("hardtanh")
def _hardtanh(c: Context, x: Any, min_val: float = -1, max_val: float = 1) -> Value:
    y = c("where", c("ge", x, max_val), max_val, x)
    return c("where", c("le", x, min_val), min_val, y)


@rule("relu6")
def _relu6(c: Context, x: Any) -> Value:
    return _hardtanh(c, x, 0, 6)


@rule("hardsigmoid")
def _hardsigmoid(c: Context, x: Any) -> Value:
    return c("mul", _hardtanh(c, c("add", x, 3.0), 0, 6), 1.0 / 6.0)


@rule("hardswish")
def _hardswish(c: Context, x: Any) -> Value:
    inside = c("lt", c("abs", x), 3.0)
    near = c("where", inside, x, 0.0)
    bend = c("mul", c("mul", near, c("add", near, 3.0)), 1.0 / 6.0)
    return c("where", inside, bend, c("where", c("le", x, -3.0), c("mul", x, 0.0), x))


@rule("leaky_relu")
def _leaky_relu(c: Context, x: Any, negative_slope: float = 0.01) -> Value:
    return c("where", c("step", x), x, c("mul", x, negative_slope))


@rule("_prelu_kernel")
def _prelu(c: Context, x: Any, weight: Any) -> Value:
    """At 0 PyTorch's slope is the weight, but no second derivative depends on it."""
    slope = c("where", c("step", x), 1.0, Stop().get(c.b, c.real(weight)))
    return c("where", c("step", c("neg", x)), c("mul", weight, x), c("mul", slope, x))


@rule("rrelu_with_noise")
def _rrelu(c: Context, x: Any, noise: Any, lower: float = 0.125, upper: float = 1 / 3, *_: Any) -> Value:
    return _leaky_relu(c, x, (lower + upper) / 2)  # in evaluation mode; in training it draws, and is refused before


@rule("elu")
def _elu(c: Context, x: Any, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Value:
    """At 0 PyTorch's slope is that of the left side, its second derivative that of the right."""
    negative = c("step", c("neg", x))
    below = c("expm1", c("mul", c("where", negative, x, 0.0), input_scale))
    left = alpha * scale * input_scale
    slope = scale if left == scale else c("where", c("step", x), scale, left)
    return c("where", negative, c("mul", below, alpha * scale), c("mul", x, slope))


@rule("celu")
def _celu(c: Context, x: Any, alpha: float = 1) -> Value:
    return _elu(c, x, alpha, 1, 1 / alpha)


@rule("selu")
def _selu(c: Context, x: Any) -> Value:
    return _elu(c, x, 1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


@rule("gelu")
def _gelu(c: Context, x: Any, *, approximate: str = "none") -> Value:
    if approximate == "tanh":
        inner = c("mul", x, c("add", 1.0, c("mul", 0.044715, c("square", x))))
        bell = c("tanh", c("mul", math.sqrt(2.0 / math.pi), inner))
    else:
        bell = c("erf", c("mul", x, math.sqrt(0.5)))
    return c("mul", c("mul", x, 0.5), c("add", 1.0, bell))


@rule("silu")
def _silu(c: Context, x: Any) -> Value:
    return c("mul", x, c("sigmoid", x))


@rule("mish")
def _mish(c: Context, x: Any) -> Value:
    return c("mul", x, c("tanh", c("softplus", x)))


@rule("softplus")
def _softplus(c: Context, x: Any, beta: float = 1, threshold: float = 20) -> Value:
    scaled = c("mul", x, beta)
    return c("where", c("gt", scaled, threshold), x, c("div", c("softplus", scaled), beta))


@rule("log_sigmoid_forward")
def _log_sigmoid(c: Context, x: Any) -> tuple[Value, None]:
    return c("neg", c("softplus", c("neg", x))), None


@rule("hardshrink")
def _hardshrink(c: Context, x: Any, lambd: float = 0.5) -> Value:
    return c("where", c("le", c("abs", x), lambd), 0.0, x)


@rule("softshrink")
def _softshrink(c: Context, x: Any, lambd: float = 0.5) -> Value:
    low = c("where", c("lt", x, -lambd), c("add", x, lambd), c("mul", x, 0.0))
    return c("where", c("gt", x, lambd), c("sub", x, lambd), low)


@rule("glu")
def _glu(c: Context, x: Any, dim: int = -1) -> Value:
    d = dim % len(c.shape(x))
    half = c.shape(x)[d] // 2
    return c("mul", c.piece(x, d, 0, half), c("sigmoid", c.piece(x, d, half, 2 * half)))
