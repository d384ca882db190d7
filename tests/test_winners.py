"""What is pooled away is not computed: pools before the functions they commute with, adjoints at the winners."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from metafast.differentiate import pull, push
from metafast.graph import Builder, Value, evaluate
from metafast.ops.winners import max_pool

SHAPE, SMALL = (2, 3, 7, 6), (2, 3, 3, 3)
WINDOWS = {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0), "dilation": (1, 1), "ceil": False}
OVERLAPPING = {**WINDOWS, "kernel": (3, 3), "padding": (1, 1)}


def affine_relu(b: Builder, x: Value) -> Value:
    scale, shift = (b.op("reshape", b.input("arg", name, (3,)), shape=(3, 1, 1)) for name in ("w", "b"))
    return b.op("relu", b.op("add", b.op("mul", x, scale), shift))


def given(**tensors: Tensor) -> dict[tuple[str, str], Tensor]:
    return {("arg", name): t for name, t in tensors.items()}


def images(seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=draw, dtype=torch.float64).mul(2).round()  # ties are common


def full_size(b: Builder, outputs: dict[str, Value]) -> Counter[str]:
    """What the outputs need that has the size of the images, view ops aside."""
    graph = b.finish(outputs)
    return Counter(n.op for n in graph.nodes if n.outputs[0].shape == SHAPE and n.op not in ("expand", "reshape"))


@pytest.mark.parametrize("window", [WINDOWS, OVERLAPPING], ids=["apart", "overlapping"])
@pytest.mark.parametrize("special", [1.0, float("nan"), float("inf"), -float("inf")])
def test_values_are_those_of_pooling_last(special: float, window: dict[str, object]) -> None:
    """To the bit, whatever the sign of the factor and whatever stands in the images."""
    b = Builder()
    y, _ = max_pool(b, affine_relu(b, b.input("arg", "x", SHAPE)), **window)
    assert not full_size(b, {"y": y})
    x, w, shift = images(), torch.tensor([0.3, -0.7, 0.0]).double(), torch.tensor([-0.1, 0.4, 0.2]).double()
    x[0, :, 2, 3] = x[1, 1, 0, 0] = special
    got = evaluate(b.finish({"y": y}), given(x=x, w=w, b=shift))["y"]
    z = F.relu(x * w[:, None, None] + shift[:, None, None])
    eager = F.max_pool2d(z, window["kernel"], window["stride"], window["padding"])
    assert torch.equal(got.nan_to_num(7.0), eager.nan_to_num(7.0))


def test_gradients_reach_the_elements_that_pytorch_gives_them_to() -> None:
    b = Builder()
    x = b.input("arg", "x", SHAPE)
    y, _ = max_pool(b, b.op("relu", x), **WINDOWS)
    (dx,) = pull(b, {y: b.input("arg", "ct", y.shape)}, [x])
    values, ct = images().requires_grad_(), torch.randn(y.shape, dtype=torch.float64)
    F.max_pool2d(F.relu(values), 2).backward(ct)
    assert torch.equal(evaluate(b.finish({"dx": dx}), given(x=values.detach(), ct=ct))["dx"], values.grad)


@pytest.mark.parametrize("f", ["relu", "tanh", "sigmoid", "exp", "expm1", "softplus", "erf", "atan", "neg"])
def test_monotone_functions_move_behind_the_pool(f: str) -> None:
    b = Builder()
    y, _ = max_pool(b, b.op(f, b.input("arg", "x", SHAPE)), **WINDOWS)
    assert not full_size(b, {"y": y})


@pytest.mark.parametrize("f", ["square", "abs", "sin", "floor", "log", "maximum", "two images", "factor of a pixel"])
def test_others_stay_where_they_are(f: str) -> None:
    b = Builder()
    x = b.input("arg", "x", SHAPE)
    if f == "two images":
        v = b.op("add", x, b.input("arg", "y", SHAPE))
    elif f == "maximum":
        v = b.op(f, x, b.const(0.0))
    elif f == "factor of a pixel":
        v = b.op("mul", x, b.input("arg", "y", (7, 1)))
    else:
        v = b.op(f, x)
    y, _ = max_pool(b, v, **WINDOWS)
    assert full_size(b, {"y": y}).total() == 1


def test_an_image_and_its_channels_factor_by_image_stays() -> None:
    """A sign is one for all images, so a factor that also varies between images is not taken apart."""
    b = Builder()
    y, _ = max_pool(b, b.op("mul", b.input("arg", "x", SHAPE), b.input("arg", "w", (2, 3, 1, 1))), **WINDOWS)
    assert full_size(b, {"y": y}) == {"mul": 1}


def test_sums_of_an_adjoint_are_taken_at_the_winners() -> None:
    """Σ ct and Σ ct·x̂ of a pooled, scaled image, and how they move: nothing of full size but gathers' images."""
    b = Builder()
    x, dot = b.input("arg", "x", SHAPE), b.input("arg", "dot", SHAPE)
    y, _ = max_pool(b, affine_relu(b, x), **WINDOWS)
    ct = b.input("arg", "ct", y.shape)
    (dx,) = pull(b, {y: ct}, [x])
    assert dx is not None
    sums = {"s": b.op("sum", dx, dims=(0, 2, 3)), "sx": b.op("sum", b.op("mul", dx, x), dims=(0, 2, 3))}
    sums |= {f"dot {k}": v for k, v in zip(sums, push(b, {x: dot}, list(sums.values())), strict=True) if v is not None}
    assert set(sums) == {"s", "sx", "dot sx"} and not full_size(b, sums)
    values = {"x": images(), "dot": images(1), "ct": images(2)[:, :, :3, :3]}
    values |= {"w": images(3)[0, :, 0, 0], "b": images(4)[0, :, 0, 0]}
    got = evaluate(b.finish(sums), given(**values))

    def eager(x: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
        z = F.relu(x * values["w"][:, None, None] + values["b"][:, None, None])
        (dx,) = torch.autograd.grad(F.max_pool2d(z, 2), x, values["ct"], create_graph=True)
        return dx.sum((0, 2, 3)), (dx * x).sum((0, 2, 3))

    x = values["x"].clone().requires_grad_()
    s, sx = eager(x)
    _, moved = torch.autograd.functional.jvp(lambda x: eager(x)[1], x.detach(), values["dot"], strict=False)
    for name, want in (("s", s), ("sx", sx), ("dot sx", moved)):
        torch.testing.assert_close(got[name], want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("overlapping", [False, True])
@pytest.mark.parametrize("form", ["mul image", "mul channel", "mul itself", "where", "where not", "neg", "add", "sub"])
def test_scattered_values(form: str, overlapping: bool) -> None:
    """Every form agrees with doing it to the images, windows apart or not."""
    window = OVERLAPPING if overlapping else WINDOWS
    b = Builder()
    x, f, c = b.input("arg", "x", SHAPE), b.input("arg", "f", SHAPE), b.input("arg", "c", (3, 1, 1))
    y, winners = max_pool(b, x, **window)
    g, h = (b.input("arg", name, y.shape) for name in "gh")
    p, q = (b.op("pool_scatter", v, winners, size=SHAPE[2:]) for v in (g, h))
    zero = b.const(0.0)
    made = {
        "mul image": lambda: b.op("mul", f, p),
        "mul channel": lambda: b.op("mul", p, c),
        "mul itself": lambda: b.op("mul", p, p),
        "where": lambda: b.op("where", b.op("step", f), p, zero),
        "where not": lambda: b.op("where", b.op("step", f), zero, p),
        "neg": lambda: b.op("neg", p),
        "add": lambda: b.op("add", p, q),
        "sub": lambda: b.op("sub", p, q),
    }[form]()
    assert full_size(b, {"y": made}).keys() <= {"pool_scatter"}
    draw = {name: images(k) for k, name in enumerate("xfgh")} | {"c": images(9)[0, :, :1, :1]}
    draw |= {name: draw[name][:, :, : y.shape[2], : y.shape[3]] for name in "gh"}
    got = evaluate(b.finish({"y": made}), given(**draw))["y"]
    at = F.max_pool2d(draw["x"], window["kernel"], 2, window["padding"], return_indices=True)[1].flatten(2)
    p, q = (torch.zeros(2, 3, 42).double().scatter_add_(2, at, draw[n].flatten(2)).reshape(SHAPE) for n in "gh")
    f, c = draw["f"], draw["c"]
    want = {"mul image": p * f, "mul channel": p * c, "mul itself": p * p, "neg": -p, "add": p + q, "sub": p - q}
    want |= {"where": p.where(f > 0, 0.0), "where not": p.where(f <= 0, 0.0)}
    torch.testing.assert_close(got, want[form], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("size", [(1, 1), (7, 6)])
def test_what_is_the_same_in_all_of_a_window_has_the_shape_of_the_winners(size: tuple[int, int]) -> None:
    b = Builder()
    p, q = (b.op("expand", b.input("arg", name, (2, 3, 1, 1)), shape=(2, 3, *size)) for name in "pq")
    _, winners = max_pool(b, b.input("arg", "x", (2, 3, *size)), **{**WINDOWS, "stride": (1, 1), "padding": (1, 1)})
    got = b.op("pool_gather", b.op("mul", p, q), winners)
    assert got.shape == winners.shape
    draw = torch.Generator().manual_seed(0)
    p, q = (torch.randn(2, 3, 1, 1, generator=draw, dtype=torch.float64) for _ in range(2))
    values = given(x=torch.randn(2, 3, *size, generator=draw, dtype=torch.float64), p=p, q=q)
    assert torch.equal(evaluate(b.finish({"y": got}), values)["y"], (p * q).expand(winners.shape))
