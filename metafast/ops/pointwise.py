"""Functions applied element by element, with NumPy broadcasting; each row is a function and its partial derivatives.

A partial is itself written in rows of this table, so a gradient can be differentiated again. None is a derivative that
is zero almost everywhere. At kinks the partial is the one PyTorch's backward uses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from metafast.graph import Attrs, Builder, Node, Value
from metafast.ops import winners
from metafast.ops.table import Op, Rule, Simplify, Spec, add_maybe, broadcast, register, sum_to

Partial = Callable[..., "Value | None"]  # (b, y, *inputs) -> ∂y/∂input

POINTWISE: set[str] = set()


def _infer(inputs: Sequence[Value], attrs: Attrs) -> tuple[Spec, ...]:
    if {v.dtype for v in inputs} != {"real"}:
        raise ValueError(f"a pointwise op takes real values, got {[v.dtype for v in inputs]}")
    return ((broadcast(*{v.shape for v in inputs}), "real"),)


def _vjp(partials: Sequence[Partial]) -> Rule:
    def rule(b: Builder, node: Node, ct: Value | None) -> list[Value | None]:
        if ct is None:
            return [None] * len(node.inputs)
        out: list[Value | None] = []
        for v, partial in zip(node.inputs, partials, strict=True):
            p = partial(b, node.outputs[0], *node.inputs)
            out.append(None if p is None else sum_to(b, b.op("mul", ct, p), v.shape))
        return out

    return rule


def _jvp(partials: Sequence[Partial]) -> Rule:
    def rule(b: Builder, node: Node, *tangents: Value | None) -> list[Value | None]:
        total: Value | None = None
        for t, partial in zip(tangents, partials, strict=True):
            p = None if t is None else partial(b, node.outputs[0], *node.inputs)
            if p is not None and t is not None:
                total = add_maybe(b, total, b.op("mul", t, p))
        return [_fill(b, total, node.outputs[0])]

    return rule


def _fill(b: Builder, tangent: Value | None, like: Value) -> Value | None:
    """A tangent has its value's shape even where only a broadcast input moved."""
    if tangent is None or tangent.shape == like.shape:
        return tangent
    return b.op("expand", tangent, shape=like.shape)


def _row(
    name: str,
    f: Callable[..., torch.Tensor],
    *partials: Partial,
    simplify: Simplify | None = None,
    vjp: Rule | None = None,
    jvp: Rule | None = None,
) -> None:
    def evaluate(x: list[torch.Tensor], attrs: Attrs) -> tuple[torch.Tensor, ...]:
        return (f(*x).to(attrs["dtype"]),)

    def folded(b: Builder, inputs: tuple[Value, ...], attrs: dict[str, object]) -> Value | None:
        numbers = [b.constant_of(v) for v in inputs]
        if None not in numbers:
            x = [torch.tensor(c, dtype=torch.float64) for c in numbers]
            return b.const(float(f(*x)))
        simpler = simplify(b, inputs, attrs) if simplify is not None else None
        return simpler if simpler is not None else winners.scatter(b, name, inputs)

    POINTWISE.add(name)
    register(
        Op(name, _infer, evaluate, "pointwise", vjp or _vjp(partials), jvp or _jvp(partials), simplify=folded)
    )


def _is(b: Builder, v: Value, number: float) -> bool:
    return b.constant_of(v) == number


def _add(b: Builder, x: tuple[Value, ...], _: dict[str, object]) -> Value | None:
    if _is(b, x[0], 0.0):
        return x[1]
    return x[0] if _is(b, x[1], 0.0) else None


def _sub(b: Builder, x: tuple[Value, ...], _: dict[str, object]) -> Value | None:
    if _is(b, x[1], 0.0):
        return x[0]
    return b.op("neg", x[1]) if _is(b, x[0], 0.0) else None


def _mul(b: Builder, x: tuple[Value, ...], _: dict[str, object]) -> Value | None:
    for one, other in (x, x[::-1]):
        c = b.constant_of(one)
        if c == 1.0:
            return other
        if c == -1.0:
            return b.op("neg", other)
        if c is not None and (n := b.producer(other)) is not None and n.op == "mul":
            for inner, rest in (n.inputs, n.inputs[::-1]):
                if (d := b.constant_of(inner)) is not None:  # c·(d·v): one product where c·d is exact enough
                    return b.op("mul", rest, b.const(c * d))
    return None


def _div(b: Builder, x: tuple[Value, ...], _: dict[str, object]) -> Value | None:
    return x[0] if _is(b, x[1], 1.0) else None


def _neg(b: Builder, x: tuple[Value, ...], _: dict[str, object]) -> Value | None:
    n = b.producer(x[0])
    return n.inputs[0] if n is not None and n.op == "neg" else None


def _one(b: Builder, *_: Value) -> Value:
    return b.const(1.0)


def _minus_one(b: Builder, *_: Value) -> Value:
    return b.const(-1.0)


def _zero(b: Builder, *_: Value) -> None:
    return None


def _tie(greater: str, at_least: str) -> Callable[[Builder, Value, Value], Value]:
    """1 where the one wins, ½ at a tie (PyTorch splits the gradient evenly), 0 where it loses."""

    def weight(b: Builder, one: Value, other: Value) -> Value:
        both = b.op("add", b.op(greater, one, other), b.op(at_least, one, other))
        return b.op("mul", both, b.const(0.5))

    return weight


_above, _below = _tie("gt", "ge"), _tie("lt", "le")


def _select_vjp(b: Builder, node: Node, ct: Value | None) -> list[Value | None]:
    """`where` passes a cotangent only where it chose: 0, not 0·∞, elsewhere."""
    if ct is None:
        return [None, None, None]
    c, x, y = node.inputs
    zero = b.const(0.0)
    parts = b.op("where", c, ct, zero), b.op("where", c, zero, ct)
    return [None, *(sum_to(b, p, v.shape) for p, v in zip(parts, (x, y), strict=True))]


def _select_jvp(b: Builder, node: Node, _: Value | None, x: Value | None, y: Value | None) -> list[Value | None]:
    if x is None and y is None:
        return [None]
    zero = b.const(0.0)
    t = b.op("where", node.inputs[0], x if x is not None else zero, y if y is not None else zero)
    return [_fill(b, t, node.outputs[0])]


def _relu_vjp(b: Builder, node: Node, ct: Value | None) -> list[Value | None]:
    return [None if ct is None else b.op("where", b.op("step", node.outputs[0]), ct, b.const(0.0))]


def _same(b: Builder, x: tuple[Value, ...], _: dict[str, object]) -> Value | None:
    return x[1] if x[1] is x[2] and x[1].shape == broadcast(*(v.shape for v in x)) else None


def _pow(b: Builder, x: tuple[Value, ...], _: dict[str, object]) -> Value | None:
    """Small whole powers as products: exact at zero, where c·(c−1)·0^(c−2) would be 0·∞."""
    c = b.constant_of(x[1])
    if c == 0.0:
        return b.op("expand", b.const(1.0), shape=x[0].shape)
    if c == 1.0:
        return x[0]
    return b.op("square", x[0]) if c == 2.0 else None


def _pow_by_base(b: Builder, y: Value, a: Value, c: Value) -> Value | None:
    """c·a^(c−1), and 0 where c is 0, whatever a is (as PyTorch)."""
    slope = b.op("mul", c, b.op("pow", a, b.op("sub", c, b.const(1.0))))
    return slope if b.constant_of(c) is not None else b.op("where", b.op("ne", c, b.const(0.0)), slope, b.const(0.0))


def _pow_by_exponent(b: Builder, y: Value, a: Value, c: Value) -> Value | None:
    """a^c·log a, and 0 where a is 0 and c is not negative (as PyTorch)."""
    if b.constant_of(c) is not None:
        return None
    zero = b.const(0.0)
    nought = b.op("mul", b.op("eq", a, zero), b.op("ge", c, zero))
    return b.op("where", nought, zero, b.op("mul", y, b.op("log", a)))


_row("add", torch.add, _one, _one, simplify=_add)
_row("sub", torch.sub, _one, _minus_one, simplify=_sub)
_row("mul", torch.mul, lambda b, y, a, c: c, lambda b, y, a, c: a, simplify=_mul)
_row(
    "div",
    torch.div,
    lambda b, y, a, c: b.op("recip", c),
    lambda b, y, a, c: b.op("neg", b.op("div", y, c)),
    simplify=_div,
)
_row("neg", torch.neg, _minus_one, simplify=_neg)
_row("exp", torch.exp, lambda b, y, x: y)
_row("log", torch.log, lambda b, y, x: b.op("recip", x))
_row("sqrt", torch.sqrt, lambda b, y, x: b.op("div", b.const(0.5), y))
_row("rsqrt", torch.rsqrt, lambda b, y, x: b.op("mul", b.const(-0.5), b.op("mul", y, b.op("square", y))))
_row("recip", torch.reciprocal, lambda b, y, x: b.op("neg", b.op("square", y)))
_row("square", torch.square, lambda b, y, x: b.op("mul", b.const(2.0), x))
_row("abs", torch.abs, lambda b, y, x: b.op("sign", x))
_row("sign", torch.sign, _zero)
_row("floor", torch.floor, _zero)
_row("maximum", torch.maximum, lambda b, y, a, c: _above(b, a, c), lambda b, y, a, c: _above(b, c, a))
_row("minimum", torch.minimum, lambda b, y, a, c: _below(b, a, c), lambda b, y, a, c: _below(b, c, a))
_row("pow", torch.pow, _pow_by_base, _pow_by_exponent, simplify=_pow)
_row("tanh", torch.tanh, lambda b, y, x: b.op("sub", b.const(1.0), b.op("square", y)))
_row("sigmoid", torch.sigmoid, lambda b, y, x: b.op("mul", y, b.op("sub", b.const(1.0), y)))
_row(
    "erf",
    torch.erf,
    lambda b, y, x: b.op("mul", b.const(2 / math.sqrt(math.pi)), b.op("exp", b.op("neg", b.op("square", x)))),
)
_row("softplus", lambda x: torch.logaddexp(x, torch.zeros_like(x)), lambda b, y, x: b.op("sigmoid", x))
_row("expm1", torch.expm1, lambda b, y, x: b.op("exp", x))
_row("log1p", torch.log1p, lambda b, y, x: b.op("recip", b.op("add", x, b.const(1.0))))
_row("sin", torch.sin, lambda b, y, x: b.op("cos", x))
_row("cos", torch.cos, lambda b, y, x: b.op("neg", b.op("sin", x)))
_row("atan", torch.atan, lambda b, y, x: b.op("recip", b.op("add", b.op("square", x), b.const(1.0))))
_row("step", lambda x: x > 0, _zero)
for _name in ("gt", "ge", "lt", "le", "eq", "ne"):
    _row(_name, getattr(torch, _name), _zero, _zero)
_row("where", lambda c, x, y: torch.where(c != 0, x, y), simplify=_same, vjp=_select_vjp, jvp=_select_jvp)
_row("relu", torch.relu, vjp=_relu_vjp, jvp=_relu_vjp)
