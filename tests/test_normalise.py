"""Every rule: a small function, captured on some numbers, evaluated as a Graph on others, against eager PyTorch.

Values agree to 1e-12 and so do gradients (through the op table's own rules) in float64, at kinks too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from normalise_cases import CASES, Case, Function
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from metafast.capture import Unsupported, capture_function
from metafast.differentiate import pull
from metafast.graph import Builder, Graph, copy_into, evaluate, same_input
from metafast.normalise import normalise


def _graph(f: Function, inputs: dict[tuple[str, str], Tensor]) -> Graph:
    return normalise(capture_function(lambda t: {"out": f(*t.values())}, inputs))


def _as_reals(graph: Graph, inputs: dict[tuple[str, str], Tensor]) -> dict[tuple[str, str], Tensor]:
    kinds = {(i.role, i.name): i.value.dtype for i in graph.inputs}
    return {k: t.double() if kinds.get(k) == "real" else t for k, t in inputs.items()}


def _gradient(graph: Graph, values: dict[tuple[str, str], Tensor], seed: Tensor) -> dict[str, Tensor]:
    """⟨seed, ∂out/∂x⟩ for each real input, through the rules of the op table."""
    b = Builder()
    env = copy_into(b, graph, same_input(b))
    ct = b.input("seed", "seed", tuple(seed.shape))
    wanted = [i for i in graph.inputs if i.role == "x"]
    grads = pull(b, {env[graph.outputs["out"]]: ct}, [env[i.value] for i in wanted])
    made = b.finish({i.name: g for i, g in zip(wanted, grads, strict=True) if g is not None}, keep_inputs=True)
    return evaluate(made, {**values, ("seed", "seed"): seed})


@pytest.mark.parametrize("c", CASES, ids=str)
def test_rule(c: Case) -> None:
    graph = _graph(c.f, c.inputs(0))
    inputs = c.inputs(1)
    leaves = {k: t.clone().requires_grad_(t.is_floating_point()) for k, t in inputs.items()}
    expected = c.f(*leaves.values())
    values = _as_reals(graph, inputs)
    got = evaluate(graph, values)["out"]
    torch.testing.assert_close(got, expected.detach().double(), rtol=1e-12, atol=1e-12, equal_nan=True)

    real = {k: t for k, t in leaves.items() if t.is_floating_point()}
    seed = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    if not expected.requires_grad:
        return
    grads = torch.autograd.grad(expected, list(real.values()), seed, allow_unused=True)
    found = _gradient(graph, values, seed)
    for (_, name), want in zip(real, grads, strict=True):
        want = torch.zeros_like(real["x", name]) if want is None else want
        mine = found.get(name, torch.zeros_like(want))
        torch.testing.assert_close(mine, want, rtol=c.tolerance, atol=c.tolerance, equal_nan=True)


# Functions without a second derivative where they are asked: PyTorch's is nan there (logaddexp, norm), or 0 (bce).
SINGULAR = {"logaddexp.inf", "norm.zero", "bce.saturated"}


@pytest.mark.parametrize("c", [c for c in CASES if c.name not in SINGULAR], ids=str)
def test_second_derivatives(c: Case) -> None:
    """The gradient of ⟨gradient, direction⟩, at kinks too."""
    graph, inputs = _graph(c.f, c.inputs(0)), c.inputs(1)
    leaves = {k: t.clone().requires_grad_(t.is_floating_point()) for k, t in inputs.items()}
    real = {k: t for k, t in leaves.items() if t.is_floating_point()}
    with sdpa_kernel(SDPBackend.MATH):  # the fused one has no second derivative
        out = c.f(*leaves.values())
    if not out.requires_grad:
        pytest.skip("nothing to differentiate")
    noise = torch.Generator().manual_seed(2)
    seed = torch.randn(out.shape, dtype=torch.float64, generator=noise)
    along = {k: torch.randn(t.shape, dtype=torch.float64, generator=noise) for k, t in real.items()}
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    first = torch.autograd.grad(out, list(real.values()), seed, create_graph=True, **options)
    slope = sum((g * d).sum() for g, d in zip(first, along.values(), strict=True))
    if not slope.requires_grad:
        pytest.skip("linear: no second derivative")
    try:
        expected = torch.autograd.grad(slope, list(real.values()), **options)
    except RuntimeError as error:
        pytest.skip(str(error))

    b = Builder()
    env = copy_into(b, graph, same_input(b))
    read = [i for i in graph.inputs if i.role == "x"]
    values = [env[i.value] for i in read]
    total = b.const(0.0)
    cotangents = {env[graph.outputs["out"]]: b.input("seed", "seed", tuple(seed.shape))}
    for i, g in zip(read, pull(b, cotangents, values), strict=True):
        if g is not None:
            part = b.op("mul", g, b.input("along", i.name, i.value.shape))
            total = b.op("add", total, b.op("sum", part, dims=tuple(range(len(part.shape)))))
    second = pull(b, {total: b.const(1.0)}, values)
    made = b.finish({i.name: g for i, g in zip(read, second, strict=True) if g is not None}, keep_inputs=True)
    given = {("along", name): d for (_, name), d in along.items()} | {("seed", "seed"): seed}
    found = evaluate(made, given | _as_reals(graph, inputs))
    for (_, name), want in zip(real, expected, strict=True):
        mine = found.get(name, torch.zeros_like(want))
        bound = max(1e-11, c.tolerance)  # a few roundings more than of the first
        torch.testing.assert_close(mine, want, rtol=bound, atol=bound, equal_nan=True)


UNSUPPORTED: dict[str, tuple[Function, str]] = {
    "sort": (lambda x: x.sort().values, "aten.sort"),
    "cumprod": (lambda x: x.cumprod(0), "aten.cumprod"),
    "floor_divide": (lambda x: torch.div(x, 2, rounding_mode="floor"), "rounding_mode"),
    "groups": (lambda x: F.conv1d(x[:2, None].expand(2, 34, 4), x[0].expand(34, 2, 4), groups=17), "17 groups"),
    "scale": (lambda x: F.interpolate(x.view(1, 3, 4), scale_factor=2.2), "no multiple"),
    "nearest": (lambda x: F.interpolate(x.view(1, 1, 3, 4), (4, 6)), "no multiple"),
    "transposed": (lambda x: F.conv_transpose2d(x.view(1, 1, 3, 4), x.view(1, 1, 3, 4)), "transposed"),
    "adaptive": (lambda x: F.adaptive_avg_pool2d(x.view(1, 1, 2, 6), (2, 4)), "unequal"),
    "norm.3": (lambda x: x.norm(p=3), "order 3"),
    "float32": (lambda x: x.float() * 2, "float32"),
    "complex": (lambda x: torch.view_as_real(torch.view_as_complex(x.view(3, 2, 2)) * 2), "view_as_complex"),
    "as_strided": (lambda x: x.as_strided((2, 2), (1, 1)) * 2, "as_strided"),
    "written": (lambda x: (lambda y: (y.as_strided((2, 2), (1, 1))[0].mul_(2), y)[-1])(x * 1), "as_strided"),
    "to_int": (lambda x: x * x.to(torch.int64), "cast"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_names_the_op_and_the_line(name: str) -> None:
    f, words = UNSUPPORTED[name]
    x = torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(Unsupported, match=words) as caught:
        _graph(f, {("x", "0"): x})
    assert "test_normalise.py" in str(caught.value)


def test_integer_inputs_that_are_computed_with_become_real() -> None:
    x, y = torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 2])
    inputs = {("x", "0"): x, ("y", "0"): y}

    def kind(f: Function) -> str:
        graph = _graph(f, inputs)
        value = graph.input("y", "0")
        assert value is not None
        return value.dtype

    assert kind(F.cross_entropy) == "int"
    assert kind(lambda x, y: x * y[:, None]) == "real"
    assert kind(lambda x, y: F.cross_entropy(x, y.view(-1).long())) == "int"


BYTES = torch.tensor([[0, 1, 2, 255], [7, 44, 128, 200]], dtype=torch.uint8)
WRAPS: dict[str, Function] = {
    "subtraction": lambda x, u: x * (u - 128).to(x.dtype),
    "subtraction in place": lambda x, u: x * u.clone().sub_(128),
    "product of two": lambda x, u: x * (u * u),
    "negation": lambda x, u: x * -u,
    "less than nothing": lambda x, u: x * (u > -1),  # PyTorch: 255
    "more than there is": lambda x, u: x * (u >= 300),  # PyTorch: 44
    "another type's number": lambda x, u: x * (u > torch.tensor(-1)),
    "filling": lambda x, u: x * u.masked_fill(u > 6, -1),
    "cast": lambda x, u: x * u.long().to(torch.uint8),
    "int32": lambda x, u: x * (u.to(torch.int32) * 2),
}
STAYS: dict[str, Function] = {
    "images": lambda x, u: x * (u.to(x.dtype) - 128) / 255,
    "by a float": lambda x, u: x + u * x + u / (x + 7),
    "wider": lambda x, u: x * (u.long() - 300),
    "comparison": lambda x, u: x * (u > 6) + (u == 44) + (u <= 0.5) + (u < u.long() * 2),
    "moves": lambda x, u: x * torch.cat([u[1:], u.flip(0)[1:]]).clone() + u[[1, 0]].to(torch.int32),
    "sum": lambda x, u: x * u.sum(),
    "choice": lambda x, u: x * torch.where(u > 6, u, -1),  # PyTorch makes a uint8 of the number first
}


@pytest.mark.parametrize("name", WRAPS)
def test_narrow_integers_that_may_wrap_are_refused(name: str) -> None:
    with pytest.raises(Unsupported, match="wraps around"):
        _graph(WRAPS[name], {("x", "0"): torch.randn(2, 4, dtype=torch.float64), ("y", "0"): BYTES})


@pytest.mark.parametrize("name", STAYS)
def test_narrow_integers_that_cannot_wrap_go_native(name: str) -> None:
    x = torch.randn(2, 4, dtype=torch.float64)
    inputs = {("x", "0"): x, ("y", "0"): BYTES}
    graph = _graph(STAYS[name], inputs)
    torch.testing.assert_close(evaluate(graph, _as_reals(graph, inputs))["out"], STAYS[name](x, BYTES))


def test_boolean_inputs_are_real() -> None:
    inputs = {("x", "0"): torch.randn(3, 4, dtype=torch.float64), ("y", "0"): torch.rand(3, 4) > 0.5}
    graph = _graph(lambda x, m: torch.where(m, x, 0.0) + (~m).double(), inputs)
    out = evaluate(graph, _as_reals(graph, inputs))["out"]
    x, m = inputs.values()
    torch.testing.assert_close(out, torch.where(m, x, 0.0) + (~m).double())


def test_scalars_keep_their_precision() -> None:
    graph = _graph(lambda x: x * 0.1 + torch.tensor(0.1), {("x", "0"): torch.zeros((), dtype=torch.float64)})
    out = evaluate(graph, {("x", "0"): torch.ones((), dtype=torch.float64)})["out"]
    assert out.item() == 0.1 + float(torch.tensor(0.1))


def test_constant_arrays_of_one_number_are_no_literals() -> None:
    graph = _graph(lambda x: x + torch.zeros(3, 4, dtype=x.dtype), {("x", "0"): torch.zeros(3, 4, dtype=torch.float64)})
    assert "literal" not in {n.op for n in graph.nodes}
