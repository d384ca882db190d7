"""Products that another array takes up, `θ − η·g`: which updates become one instruction, and that they stay right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import assert_same, require
from torch import Tensor, nn

import metafast
from metafast.native import Plan, captured, make_plan

pytest.importorskip("metafast._C", reason="the native backend is not built", exc_type=ImportError)

GENERATOR = torch.Generator().manual_seed(5)
BATCH = tuple(torch.randn(3, 6, n, generator=GENERATOR, dtype=torch.float64) for n in (7, 2))


class Momentum(metafast.UpdateRule):
    def init(self, params: Any, hyper: Any) -> Any:
        return {name: torch.zeros_like(p) for name, p in params.items()}

    def update(self, params: Any, grads: Any, state: Any, hyper: Any, *_: Any) -> Any:
        state = {name: hyper["mu"] * state[name] + g for name, g in grads.items()}
        return {name: p - hyper["lr"] * state[name] for name, p in params.items()}, state


UPDATES = {
    "number": metafast.SGD(lr=0.1),
    "tensor": metafast.SGD(lr=nn.Parameter(torch.tensor(0.1, dtype=torch.float64))),
    "momentum": Momentum(lr=0.1, mu=0.9),
}


class Tied(nn.Module):
    """One weight used twice, once turned: its gradient is a sum of two products."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 7))
        self.out = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.tanh(F.linear(x, self.weight)) @ self.weight)


MODELS = {
    "plain": lambda: nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 2)),
    "square": lambda: nn.Sequential(nn.Linear(7, 1), nn.Tanh(), nn.Linear(1, 2, bias=False)),
    "tied": Tied,
}


def inner_loop(model: str, update: str, backend: str) -> metafast.InnerLoop:
    torch.manual_seed(2)
    module = MODELS[model]().double()
    return metafast.InnerLoop(module, F.mse_loss, update=UPDATES[update], steps=3, backend=backend)


def plan_of(model: str, update: str) -> Plan:
    problem = inner_loop(model, update, "native")._problem(BATCH, BATCH, gradient=True)[0]
    return make_plan(problem, captured(problem))


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("model", MODELS)
def test_the_meta_gradient_is_eager_pytorchs(model: str, update: str) -> None:
    got = inner_loop(model, update, require("native")).meta_gradient(BATCH, BATCH)[1]
    assert_same(got, inner_loop(model, update, "torch").meta_gradient(BATCH, BATCH)[1])


@pytest.mark.parametrize(("model", "update", "inner", "meta"), [("plain", "number", 2, 2), ("plain", "momentum", 0, 2)])
def test_updates_of_matrices_are_one_instruction(model: str, update: str, inner: int, meta: int) -> None:
    """Momentum makes more of the gradient than one sum, in a pass over all parameters; its adjoint is one sum again."""
    code = plan_of(model, update).program("fused", steps=3).code
    taken = {name: [i for i in code[name] if i.kernel == "gemm" and i.ints[13] >= 2] for name in ("inner", "meta")}
    assert len(taken["inner"]) == inner
    assert sum(i.operands[3].buffer is not i.operands[2].buffer for i in taken["meta"]) == meta
