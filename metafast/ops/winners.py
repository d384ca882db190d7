"""What is done to whole images and needed at the winners of a pool alone is done at the winners.

    max_pool(f(x)) = f(max_pool(x))     f increasing, the same for all of a window; where it falls, the minimum wins
    gather(f(x, y)) = f(gather(x), gather(y))
    scatter(g)·f = scatter(g·gather(f)),   Σ scatter(g) = Σ g

Values agree to the bit: f is the same operation on the same numbers, and rounding keeps their order. Where f makes two
numbers of a window equal another of the two may win; where that is more than a rounding (`relu`, a saturated `tanh`),
the slope of f is 0 at both: of `maximum` it is not, where both are the same number, so that one stays before the pool.
A pool leaves a quarter of an image's elements or fewer, and what it alone reads of an image need not be written down.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

from metafast.graph import Builder, Node, Shape, Value
from metafast.ops.table import TABLE, broadcast, numel
from metafast.passes import enabled

INCREASING = {"relu", "tanh", "sigmoid", "exp", "expm1", "softplus", "erf", "atan"}
POSITIVE = {"exp", "rsqrt", "sigmoid", "softplus"}
MAX_GATHERS = 2  # gathering the images that a value is made of reads each of them once; making it writes one as well

P = ParamSpec("P")
Found = TypeVar("Found")


def _rewrite(find: Callable[P, Found | None]) -> Callable[P, Found | None]:
    """A rule of this pass: it finds nothing where the pass is left out."""

    @functools.wraps(find)
    def found(*args: P.args, **kwargs: P.kwargs) -> Found | None:
        return find(*args, **kwargs) if enabled("winners") else None

    return found


# ---- the maximum ----------------------------------------------------------------------------------------------


def max_pool(b: Builder, x: Value, sign: Value | None = None, **attrs: Any) -> tuple[Value, Value]:
    """Maximum and winners of f(x₀) as f of x₀ at its winners, for all of the monotone f that made x."""
    chain: list[tuple[Node, Value]] = []
    while (step := _monotone(b, x)) is not None:
        node, moving, slope = step
        x, sign = moving, _product(b, sign, slope)
        chain.append((node, moving))
    y, winners = b.ops("max_pool", x, *(() if sign is None else (sign,)), **attrs)
    for node, moving in reversed(chain):
        y = b.op(node.op, *(y if v is moving else flat_on_windows(b, v) for v in node.inputs))  # type: ignore[arg-type]
    return y, winners


@_rewrite
def _monotone(b: Builder, x: Value) -> tuple[Node, Value, Value | None] | None:
    """(node, the image it is a monotone function of, its slope's sign for each channel, None: never negative)."""
    node = b.producer(x)
    if node is None:
        return None
    moving = [v for v in node.inputs if v.shape == x.shape and flat_on_windows(b, v) is None]
    if len(moving) != 1 or any(v is not moving[0] and flat_on_windows(b, v) is None for v in node.inputs):
        return None
    channels = (x.shape[1],)
    if node.op in INCREASING | {"add"} or (node.op == "sub" and node.inputs[0] is moving[0]):
        return node, moving[0], None
    if node.op in ("neg", "sub"):
        return node, moving[0], b.op("expand", b.const(-1.0), shape=channels)
    if node.op != "mul":
        return None
    factor = next(v for v in node.inputs if v is not moving[0])
    if _positive(b, factor):
        return node, moving[0], None
    lines = _a_channel(b, factor, channels)
    return None if lines is None else (node, moving[0], b.op("sign", lines))


def _positive(b: Builder, v: Value) -> bool:
    """Whether no element can be negative."""
    if (number := b.constant_of(v)) is not None:
        return number >= 0
    node = b.producer(v)
    if node is None or TABLE[node.op].kernel != "view":
        return node is not None and (node.op in POSITIVE or (node.op == "standardize" and v is node.outputs[1]))
    return _positive(b, node.inputs[0])


def _a_channel(b: Builder, v: Value, channels: Shape) -> Value | None:
    """A factor as one number for each channel; None where it depends on the image too."""
    flat = flat_on_windows(b, v)
    assert flat is not None
    if numel(flat.shape) not in (1, channels[0]) or (len(flat.shape) == 4 and flat.shape[0] != 1):
        return None
    return b.op("expand", b.op("reshape", flat, shape=(numel(flat.shape),)), shape=channels)


def _product(b: Builder, x: Value | None, y: Value | None) -> Value | None:
    return y if x is None else x if y is None else b.op("mul", x, y)


def flat_on_windows(b: Builder, v: Value) -> Value | None:
    """The value without what repeats it along height and width; None where it varies there."""
    while (node := b.producer(v)) is not None and node.op == "expand":
        v = node.inputs[0]
    return v if all(n == 1 for n in v.shape[-2:]) and len(v.shape) <= 4 else None


# ---- gathering ------------------------------------------------------------------------------------------------


@_rewrite
def gather(b: Builder, x: tuple[Value, ...], _: dict[str, Any]) -> Value | None:
    """pool_gather(x, winners) from what is known at the winners already and few gathers of other images."""
    v, winners = x
    known = _known(b, v, winners)
    if known is not None:
        return known
    node = b.producer(v)
    if node is None or not _pointwise(node) or len(_images(b, v, winners, {})) > MAX_GATHERS:
        return None
    parts = [_at_winners(b, i, winners, v.shape) for i in node.inputs]
    if None in parts:
        return None
    return b.op("expand", b.op(node.op, *parts), shape=winners.shape)  # type: ignore[arg-type]


def _at_winners(b: Builder, v: Value, winners: Value, image: Shape) -> Value | None:
    """v at the winners of images of that shape, or what broadcasts to it; None where v has some other shape."""
    flat = flat_on_windows(b, v)
    if flat is not None:
        return flat
    return b.op("pool_gather", v, winners) if v.shape == image else None


def _known(b: Builder, v: Value, winners: Value) -> Value | None:
    pool, node = b.producer(winners), b.producer(v)
    if pool is None or pool.op != "max_pool":
        return None
    if pool.inputs[0] is v:
        return pool.outputs[0]
    if node is not None and node.op == "pool_scatter" and node.inputs[1] is winners and apart(pool):
        return node.inputs[0]
    return None


def apart(pool: Node) -> bool:
    """Whether no element lies in two windows."""
    a = pool.attrs
    return a["dilation"] == (1, 1) and all(k <= s for k, s in zip(a["kernel"], a["stride"], strict=True))


def _pointwise(node: Node) -> bool:
    return TABLE[node.op].kernel == "pointwise"


def _images(b: Builder, v: Value, winners: Value, seen: dict[Value, set[Value]]) -> set[Value]:
    """The images that have to be gathered to know v at the winners."""
    if v not in seen:
        node = b.producer(v)
        if flat_on_windows(b, v) is not None or _known(b, v, winners) is not None:
            seen[v] = set()
        elif node is not None and _pointwise(node):
            seen[v] = set().union(*(_images(b, i, winners, seen) for i in node.inputs))
        else:
            seen[v] = {v}
    return seen[v]


# ---- scattering -----------------------------------------------------------------------------------------------


@_rewrite
def scatter(b: Builder, op: str, x: Sequence[Value]) -> Value | None:
    """A pointwise op that is 0 wherever a scattered input is, as the op on the winners."""
    makers = {k: n for k, v in enumerate(x) if (n := b.producer(v)) is not None and n.op == "pool_scatter"}
    found = {k: makers[k] for k in _carrying(b, op, x) if k in makers} if makers else {}
    if not found:
        return None
    at, node = next(iter(found.items()))
    given, winners = node.inputs
    image = node.outputs[0].shape
    if broadcast(*(v.shape for v in x)) != image:
        return None
    if op in ("add", "sub"):  # of two that are scattered along the same winners
        parts: list[Value | None] = [n.inputs[0] if n.inputs[1] is winners else None for n in found.values()]
        parts += [None] * (2 - len(parts))
    else:
        parts = [given if k == at else _at_winners(b, v, winners, image) for k, v in enumerate(x)]
    if None in parts:
        return None
    return b.op("pool_scatter", b.op(op, *parts), winners, **node.attrs)  # type: ignore[arg-type]


def _carrying(b: Builder, op: str, x: Sequence[Value]) -> tuple[int, ...]:
    """The inputs whose zeros are zeros of the result."""
    if op in ("neg", "mul", "add", "sub"):
        return tuple(range(len(x)))
    if op == "where":
        return tuple(k for k in (1, 2) if b.constant_of(x[3 - k]) == 0.0)
    return ()


@_rewrite
def total(b: Builder, x: tuple[Value, ...], attrs: dict[str, Any]) -> Value | None:
    """Σ scatter(g) over whole images is Σ g."""
    node = b.producer(x[0])
    if node is None or node.op != "pool_scatter" or not {2, 3} <= set(attrs["dims"]):
        return None
    return b.op("sum", node.inputs[0], **attrs)
