"""Update rules written in plain torch: right to second order, with gradients of their hyper-parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import oracle
import pytest
import torch
from parity import (
    BACKENDS,
    WAYS_OUT,
    answer,
    assert_same,
    inner_loop,
    metafast_gradients,
    named,
    relative_error,
    require,
)
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import Task
from zoo import named as entry_named

import metafast

Params = dict[str, Tensor]


def like(params: Params) -> dict[str, Tensor]:
    return {n: torch.zeros_like(p) for n, p in params.items()}


# ---- momentum, the gradient clipped by its global norm -----------------------------------------------


def velocity(params: Params, hyper: Mapping[str, Any]) -> dict[str, Any]:
    return {"velocity": like(params)}


def clipped_momentum(
    params: Params, grads: Params, state: Any, hyper: Mapping[str, Any], k: Tensor, params0: Params
) -> Any:
    """Reads the whole tree: the norm is that of all gradients together."""
    norm = torch.sqrt(sum((g * g).sum() for g in grads.values()) + 1e-12)
    factor = (hyper["largest"] / norm).clamp(max=1.0)
    new = {n: hyper["beta"] * state["velocity"][n] + factor * g for n, g in grads.items()}
    return {n: p - hyper["lr"] * new[n] for n, p in params.items()}, {"velocity": new}


# ---- Adam --------------------------------------------------------------------------------------------


def moments(params: Params, hyper: Mapping[str, Any]) -> dict[str, Any]:
    return {"first": like(params), "second": like(params)}


def adam(
    params: Params, grads: Params, state: Any, hyper: Mapping[str, Any], k: Tensor, params0: Params
) -> Any:
    """Kingma & Ba, arXiv:1412.6980, algorithm 1; ε under the root, so that a zero moment has a derivative."""
    b1, b2 = hyper["beta1"], hyper["beta2"]
    first = {n: b1 * m + (1 - b1) * grads[n] for n, m in state["first"].items()}
    second = {n: b2 * v + (1 - b2) * grads[n] ** 2 for n, v in state["second"].items()}
    rate = hyper["lr"] * torch.sqrt(1 - b2 ** (k + 1)) / (1 - b1 ** (k + 1))
    new = {n: p - rate * first[n] / torch.sqrt(second[n] + hyper["eps"]) for n, p in params.items()}
    return new, {"first": first, "second": second}


# ---- proximal descent, decaying rates, a state that starts from a hyper-parameter ---------------------


def proximal(
    params: Params, grads: Params, state: Any, hyper: Mapping[str, Any], k: Tensor, params0: Params
) -> Any:
    """Pulls back to the start (Rajeswaran et al., arXiv:1909.04630, equation 3), at a decaying rate."""
    rate = hyper["lr"] / (1.0 + hyper["decay"] * k)
    pull = hyper["pull"]
    return {n: p - rate * (grads[n] + pull * (p - params0[n])) for n, p in params.items()}, state


def learned_start(params: Params, hyper: Mapping[str, Any]) -> dict[str, Any]:
    return {"average": {n: hyper["start"] * p for n, p in params.items()}}


def averaging(
    params: Params, grads: Params, state: Any, hyper: Mapping[str, Any], k: Tensor, params0: Params
) -> Any:
    """Descends from an average of past parameters whose start is learned."""
    average = {n: 0.5 * a + 0.5 * params[n] for n, a in state["average"].items()}
    return {n: a - hyper["lr"] * grads[n] for n, a in average.items()}, {"average": average}


@dataclass(frozen=True, eq=False)
class Rule:
    """A rule, and its hyper-parameters for a model: numbers, or tensors for each parameter."""

    name: str
    update: oracle.Update
    hyper: Callable[[nn.Module], dict[str, Any]]
    init: Callable[..., Any] = oracle.no_state

    def values(self, task: Task) -> dict[str, Any]:
        """The hyper-parameters as tensors of the model's dtype."""
        dtype = next(task.model.parameters()).dtype
        return pytree.tree_map(lambda v: torch.as_tensor(v).to(dtype), self.hyper(task.model))


def each(model: nn.Module, of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {
        n: of(torch.rand(p.shape, generator=draw, dtype=torch.float64)) for n, p in model.named_parameters()
    }


RULES = [
    Rule("momentum", clipped_momentum, lambda m: {"lr": 0.25, "beta": 0.75, "largest": 0.5}, velocity),
    Rule("unclipped", clipped_momentum, lambda m: {"lr": 0.25, "beta": 0.75, "largest": 64.0}, velocity),
    Rule("adam", adam, lambda m: {"lr": 0.0625, "beta1": 0.75, "beta2": 0.875, "eps": 2.0**-10}, moments),
    Rule("proximal", proximal, lambda m: {"lr": 0.25, "decay": 0.5, "pull": 0.5}),
    Rule("averaging", averaging, lambda m: {"lr": 0.25, "start": 0.75}, learned_start),
    Rule("per_parameter", oracle.sgd, lambda m: {"lr": each(m, lambda r: 0.25 * r.flatten()[0])}),
    Rule("meta_sgd", oracle.sgd, lambda m: {"lr": each(m, lambda r: 0.25 * r)}),
]
MODELS = ["mlp_gelu", "conv4_max_pool", "anil", "tied_weights"]
CROSS = [
    pytest.mark.parametrize("backend", BACKENDS),
    pytest.mark.parametrize("way", WAYS_OUT),
    pytest.mark.parametrize("steps", [0, 1, 3]),
    pytest.mark.parametrize("order", [1, 2]),
    pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name),
    pytest.mark.parametrize("model", MODELS),
]


def crossed(test: Callable[..., None]) -> Callable[..., None]:
    for mark in CROSS:
        test = mark(test)
    return test


def hyper_for(rule: Rule, task: Task) -> dict[str, Any]:
    """The hyper-parameters that the adapted parameters of a task read."""
    adapted = set(task.adapted())
    return {
        n: {p: t for p, t in v.items() if p in adapted} if isinstance(v, dict) else v
        for n, v in rule.values(task).items()
    }


def learned(rule: Rule, task: Task) -> metafast.UpdateRule:
    """The rule for the adapted parameters of a task, every hyper-parameter learned."""
    hyper = pytree.tree_map(nn.Parameter, hyper_for(rule, task))
    if rule.update is oracle.sgd:
        return metafast.SGD(**hyper)
    return metafast.UpdateRule(init=rule.init, update=rule.update, **hyper)


def expected_answer(rule: Rule, task: Task, order: int, steps: int) -> oracle.Answer:
    return answer(task, order, steps, hyper=hyper_for(rule, task), init=rule.init, update=rule.update)


@crossed
def test_float64(model: str, rule: Rule, order: int, steps: int, way: str, backend: str) -> None:
    entry = entry_named(model)
    task = entry.make()
    inner = inner_loop(task, require(backend), update=learned(rule, task), steps=steps, order=order)
    loss, got = metafast_gradients(inner, task, way)
    expected = expected_answer(rule, entry.make(), order, steps)
    torch.testing.assert_close(loss, expected.losses.mean(), rtol=1e-12, atol=0.0)
    assert_same(got, named(expected))


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32(model: str, rule: Rule, backend: str) -> None:
    """Within 4 times the error of PyTorch's own float32, and 1e-6: some roundings of 6e-8."""
    entry = entry_named(model)
    task = entry.make(torch.float32)
    inner = inner_loop(task, require(backend), update=learned(rule, task), steps=3)
    _, got = metafast_gradients(inner, task, "fused")
    exact = named(expected_answer(rule, entry.make(rounded=True), 2, 3))
    eager = named(expected_answer(rule, entry.make(torch.float32), 2, 3))
    assert relative_error(got, exact) <= 4.0 * relative_error(eager, exact) + 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_number_set_between_calls(backend: str) -> None:
    """Numbers reach the rule as inputs: a schedule changes the answer, and gives that of a rule made anew."""
    task = entry_named("mlp_gelu").make()
    inner = inner_loop(task, require(backend), update=metafast.SGD(lr=0.5), steps=2)
    losses = []
    for lr in (0.5, 0.125):
        inner.update.lr = lr
        losses.append(float(inner(task.support, task.query).detach()))
    fresh = inner_loop(task, backend, update=metafast.SGD(lr=0.125), steps=2)
    assert losses[1] == float(fresh(task.support, task.query).detach())
    assert losses[0] != losses[1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state", [None, 3, {"scale": 0.5, "none": [None]}], ids=str)
def test_a_state_that_holds_no_tensor(backend: str, state: Any) -> None:
    """It is a constant, as long as the rule gives it back as it was."""

    def update(params: Params, grads: Params, state: Any, hyper: Any, *_: Any) -> Any:
        scale = state["scale"] if isinstance(state, dict) else 1.0
        return {n: p - scale * hyper["lr"] * grads[n] for n, p in params.items()}, state

    task = entry_named("mlp_gelu").make()
    rule = metafast.UpdateRule(lambda params, hyper: state, update, lr=0.1)
    sgd = metafast.SGD(lr=0.05 if isinstance(state, dict) else 0.1)
    got = inner_loop(task, require(backend), rule, steps=2).meta_gradient(task.support, task.query)[1]
    want = inner_loop(task, "torch", sgd, steps=2).meta_gradient(task.support, task.query)[1]
    assert_same({n: got[n] for n in task.adapted()}, {n: want[n] for n in task.adapted()})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", [1, 2])
def test_one_tensor_for_two_parameters_is_two_values(backend: str, order: int) -> None:
    """Each has the gradient of its own place, as if the second were a copy."""
    require(backend)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    batch = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)

    def gradients(backend: str, again: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        def update(params: Params, grads: Params, state: Any, hyper: Any, *_: Any) -> Any:
            w = params["0.weight"] - hyper["lr"] * grads["2.weight"]
            made = {n: p - hyper["lr"] * grads[n] for n, p in params.items()}
            return {**made, "0.weight": w, "2.weight": again(w)}, state

        rule = metafast.UpdateRule(update=update, lr=0.1)
        loop = metafast.InnerLoop(model, nn.MSELoss(), update=rule, steps=3, order=order, backend=backend)
        return loop.meta_gradient(batch, batch)[1]

    assert_same(gradients(backend, lambda w: w), gradients("torch", torch.clone))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_subclass(backend: str) -> None:
    """A rule as a class of one's own gives what the pair of functions gives."""

    class Momentum(metafast.UpdateRule):
        def init(self, params: Params, hyper: Any) -> Any:
            return velocity(params, hyper)

        def update(self, *args: Any) -> Any:
            return clipped_momentum(*args)

    rule = RULES[0]
    task = entry_named("mlp_gelu").make()
    update = Momentum(**pytree.tree_map(nn.Parameter, rule.values(task)))
    inner = inner_loop(task, require(backend), update=update, steps=2)
    _, got = metafast_gradients(inner, task, "fused")
    assert_same(got, named(expected_answer(rule, entry_named("mlp_gelu").make(), 2, 2)))


# ---- hyper-parameters of shapes of their own ---------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_hyper_parameters_need_not_be_as_wide_as_parameters(backend: str) -> None:
    """A rate for each step, read by k, and a matrix that turns the gradient."""
    require(backend)
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 4, 2, dtype=torch.float64)
    rates = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    turn = torch.eye(2, dtype=torch.float64) + 0.1

    def update(params: Params, grads: Params, state: Any, hyper: Mapping[str, Any], k: Tensor, params0: Params) -> Any:
        rate = (hyper["rates"] * (torch.arange(3, dtype=torch.float64) == k)).sum()
        return {n: p - rate * (hyper["turn"] @ grads[n]) for n, p in params.items()}, state

    def objective(m: nn.Module, b: Any) -> Tensor:
        return (m(b[0]) - b[1]).pow(2).mean()

    rule = metafast.UpdateRule(update=update, rates=nn.Parameter(rates), turn=nn.Parameter(turn))
    inner = metafast.InnerLoop(model, objective=objective, update=rule, steps=3, backend=backend)
    found = inner.meta_gradient((x, y), (x, y))[1]
    want = oracle.meta_gradient(
        model, objective, (x, y), (x, y), hyper={"rates": rates, "turn": turn}, steps=3, update=update
    )
    for name, gradient in want.hyper.items():
        assert relative_error({name: found["update." + name]}, {name: gradient}) < 1e-9
