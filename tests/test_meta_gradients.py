"""Meta-gradients of a zoo of models, by both ways out, against an eager loop, torch.func and differences."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import (
    BACKENDS,
    WAYS_OUT,
    answer,
    assert_float32,
    assert_same,
    collected,
    exact_answer,
    inner_loop,
    metafast_gradients,
    named,
    outer_loss,
    require,
    vector,
)
from torch import Tensor
from torch.func import functional_call
from zoo import ENTRIES, LR, Entry, Task
from zoo import named as entry_named

# torch.func.jvp loads its decompositions through torch.jit.script at its first use.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

ALL = pytest.mark.parametrize("entry", ENTRIES, ids=str)
BACKEND = pytest.mark.parametrize("backend", BACKENDS)
WAY = pytest.mark.parametrize("way", WAYS_OUT)


def some(*names: str) -> Any:
    return pytest.mark.parametrize("entry", [entry_named(n) for n in names], ids=str)


# ---- against the eager loop --------------------------------------------------------------------------


@ALL
@BACKEND
@WAY
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("order", [1, 2])
def test_float64(entry: Entry, order: int, steps: int, way: str, backend: str) -> None:
    task = entry.make()
    inner = inner_loop(task, require(backend), steps=steps, order=order)
    loss, got = metafast_gradients(inner, task, way)
    expected = exact_answer(entry, order, steps, torch.float64, False)
    torch.testing.assert_close(loss, expected.losses.mean(), rtol=1e-12, atol=0.0)
    assert_same(got, named(expected))
    if way == "fused":
        for name, buffer in task.model.named_buffers():
            torch.testing.assert_close(buffer, expected.buffers[name], rtol=1e-10, atol=1e-12)


@ALL
@WAY
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("order", [1, 2])
def test_float32(entry: Entry, order: int, steps: int, way: str) -> None:
    assert_float32(entry, order, steps, way)


@ALL
@BACKEND
def test_adapted_parameters(entry: Entry, backend: str) -> None:
    task = entry.make()
    with torch.no_grad():
        fast = inner_loop(task, require(backend), steps=3).adapt(task.support)
    expected = exact_answer(entry, 2, 3, torch.float64, False).fast
    assert_same({n: fast[n] for n in expected}, expected, 1e-10)


# ---- against torch.func and finite differences ---------------------------------------------------------


def func_meta_gradient(task: Task, steps: int) -> dict[str, Tensor]:
    """The same meta-gradient by nested torch.func.grad, all parameters adapting."""
    model, loss = task.model, task.loss
    assert loss is not None

    def loss_of(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(functional_call(model, params, (x,)), y)

    def meta_loss(params: dict[str, Tensor]) -> Tensor:
        losses = []
        for t in range(len(task.support[0])):
            fast = params
            for _ in range(steps):
                grads = torch.func.grad(loss_of)(fast, task.support[0][t], task.support[1][t])
                fast = {n: p - LR * grads[n] for n, p in fast.items()}
            losses.append(loss_of(fast, task.query[0][t], task.query[1][t]))
        return torch.stack(losses).mean()

    return torch.func.grad(meta_loss)({n: p.detach() for n, p in model.named_parameters()})


@some("mlp_gelu", "mlp_layer_norm", "attention", "conv4_eval", "conv_group_norm", "strided_conv", "huber")
@BACKEND
def test_against_torch_func(entry: Entry, backend: str) -> None:
    task = entry.make()
    expected = func_meta_gradient(task, 3)
    inner = inner_loop(task, require(backend), steps=3)
    _, got = metafast_gradients(inner, task, "fused")
    assert_same({n: got[n] for n in expected}, expected)


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.smooth], ids=str)
@BACKEND
def test_against_finite_differences(entry: Entry, backend: str) -> None:
    """(L(θ + h v) − L(θ − h v)) / 2h along a random v in all parameters, the rate and the externs at once."""
    task = entry.make()
    inner = inner_loop(task, require(backend), steps=2)
    _, got = metafast_gradients(inner, task, "fused")
    leaves = [*task.model.parameters(), *_learned(inner, task), *task.externs]
    draw = torch.Generator().manual_seed(3)
    along = [torch.randn(t.shape, generator=draw, dtype=t.dtype) for t in leaves]
    slope = sum(float((g * v).sum()) for g, v in zip(got.values(), along, strict=True))
    h, losses = 1e-5, []
    with torch.no_grad():
        for step in (h, -2 * h):
            for t, v in zip(leaves, along, strict=True):
                t += step * v
            losses.append(float(inner(task.support, task.query)))
    assert slope == pytest.approx((losses[0] - losses[1]) / (2 * h), rel=1e-6, abs=1e-9)


def _learned(inner: torch.nn.Module, task: Task) -> list[Tensor]:
    model = {id(p) for p in task.model.parameters()}
    return [p for p in inner.parameters() if id(p) not in model]


# ---- other ways to ask -------------------------------------------------------------------------------


@some("mlp_relu", "conv4_max_pool", "anil", "tied_weights")
@BACKEND
def test_the_mapping_of_gradients(entry: Entry, backend: str) -> None:
    """`meta_gradient` gives what `backward` gives, and leaves `.grad` alone."""
    task = entry.make()
    loss, gradients = inner_loop(task, require(backend), steps=2).meta_gradient(task.support, task.query)
    assert all(p.grad is None for p in task.model.parameters())
    expected = answer(entry.make(), 2, 2)
    assert float(loss) == pytest.approx(float(expected.losses.mean()), rel=1e-12)
    assert_same({n: gradients[n] for n in expected.params}, expected.params)


@some("mlp_relu", "conv4_max_pool", "soft_targets")
@BACKEND
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions(entry: Entry, backend: str, reduction: str) -> None:
    task = entry.make()
    weights = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    inner = inner_loop(task, require(backend), steps=2, reduction=reduction)
    loss = inner(task.support, task.query)
    if reduction == "none":
        (loss * weights).sum().backward()
    else:
        loss.backward()
        weights = torch.ones_like(weights)
    expected = answer(entry.make(), 2, 2, weights=weights)
    assert_same(collected(inner, task), named(expected))
    for name, buffer in task.model.named_buffers():
        torch.testing.assert_close(buffer, expected.buffers[name], rtol=1e-10, atol=1e-12)


@some("mlp_tanh_sigmoid", "sinusoid", "conv_group_norm", "soft_targets", "conv4_max_pool", "anil")
@BACKEND
@WAY
@pytest.mark.parametrize("order", [1, 2])
def test_gradients_of_the_data(entry: Entry, backend: str, way: str, order: int) -> None:
    """Floating-point support and query tensors that require grad receive it, task by task."""
    task = entry.make()
    data = [t for t in torch.utils._pytree.tree_leaves((task.support, task.query)) if t.is_floating_point()]
    expected = answer(task, order, 2, data=True)
    for t in data:
        t.requires_grad_()
    inner = inner_loop(task, require(backend), steps=2, order=order)
    loss = inner(task.support, task.query) if way == "fused" else outer_loss(task, inner.adapt(task.support))
    loss.backward()
    got = {str(i): torch.zeros_like(t) if t.grad is None else t.grad for i, t in enumerate(data)}
    assert_same(got, {str(i): g for i, g in enumerate(expected.data)})


@BACKEND
@WAY
def test_another_query_loss(backend: str, way: str) -> None:
    task = entry_named("huber").make()
    assert task.loss is not None
    inner = inner_loop(task, require(backend), steps=2, query_loss=F.mse_loss)

    def query_objective(model: torch.nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    expected = answer(copy.deepcopy(task), 2, 2, query_objective=query_objective)
    if way == "fused":
        inner(task.support, task.query).backward()
    else:
        outer_loss(task, inner.adapt(task.support), query_objective).backward()
    assert_same(collected(inner, task), named(expected))


@some("mlp_gelu", "conv4_eval", "anil", "conv4_max_pool")
@BACKEND
def test_logits_of_the_fast_weights(entry: Entry, backend: str) -> None:
    """`fast(x)` is every task's adapted model on that task's x, and differentiable."""
    task = entry.make()
    inner = inner_loop(task, require(backend), steps=2)
    logits = inner.adapt(task.support)(task.query[0])
    assert logits.shape[:2] == task.query[1].shape
    F.cross_entropy(logits.flatten(0, 1), task.query[1].flatten()).backward()
    expected = answer(entry.make(), 2, 2)
    assert_same(collected(inner, task), named(expected))


@BACKEND
def test_outputs_beside_the_loss(backend: str) -> None:
    """`return_outputs=True` gives the query outputs, differentiable beside the loss."""
    task = entry_named("mlp_gelu").make()

    def objective(model: torch.nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        logits = model(batch[0])
        return F.cross_entropy(logits, batch[1]), logits

    task.loss, task.objective = None, objective
    inner = inner_loop(task, require(backend), steps=2, return_outputs=True)
    loss, logits = inner(task.support, task.query)
    (loss + 0.1 * logits.square().mean()).backward()

    def with_penalty(model: torch.nn.Module, batch: Any) -> Tensor:
        logits = model(batch[0])
        return F.cross_entropy(logits, batch[1]) + 0.1 * logits.square().mean()

    plain = entry_named("mlp_gelu").make()
    expected = answer(plain, 2, 2, query_objective=with_penalty)
    assert_same(collected(inner, task), named(expected))


@BACKEND
def test_frozen_parameters(backend: str) -> None:
    """A parameter that does not require grad adapts all the same, and receives nothing."""
    task = entry_named("mlp_gelu").make()
    expected = answer(task, 2, 2)
    task.model[0].weight.requires_grad_(False)
    inner = inner_loop(task, require(backend), steps=2)
    _, got = metafast_gradients(inner, task, "fused")
    assert task.model[0].weight.grad is None
    kept = [n for n in expected.params if n != "0.weight"]
    assert_same({n: got[n] for n in kept}, {n: expected.params[n] for n in kept})
    assert torch.isfinite(vector(got)).all()
