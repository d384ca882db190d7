"""Products that steps keep for their way back: the meta-gradient is that of computing them again."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from parity import WAYS_OUT, assert_same, exact_answer, inner_loop, metafast_gradients, named, require
from test_lanes import repeat
from torch import nn
from zoo import ENTRIES, Entry

import metafast
from metafast.keep import keep
from metafast.lower import Lowered
from metafast.native import Plan, captured, make_plan
from metafast.steps import MOST_KEPT_BYTES

_C = pytest.importorskip("metafast._C", reason="the native backend is not built", exc_type=ImportError)

BATCH = (torch.linspace(-1, 1, 2 * 4 * 20, dtype=torch.float64).reshape(2, 4, 20).sin(), torch.zeros(2, 4, 3).double())


def plan_of(width: int = 20, order: int = 2) -> Plan:
    model = nn.Sequential(nn.Linear(20, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))
    inner = metafast.InnerLoop(model.double(), F.mse_loss, update=metafast.SGD(lr=0.1), steps=3, order=order)
    problem = inner._problem(BATCH, BATCH, gradient=True)[0]
    return make_plan(problem, captured(problem))


def products(lowered: Lowered, section: str) -> int:
    return sum(ins.kernel == "gemm" for ins in lowered.code[section])


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
@pytest.mark.parametrize("way", WAYS_OUT)
@pytest.mark.parametrize("side_by_side", [False, True])
def test_meta_gradients(entry: Entry, way: str, side_by_side: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much is kept, and where tasks lie side by side, too."""
    backend, lanes = require("native"), _C.vector_bytes() // 8 if side_by_side else 1
    monkeypatch.setattr("metafast.steps.MOST_KEPT_BYTES", 1 << 40)
    monkeypatch.setattr("metafast.native.divided", lambda state, itemsize, tasks, work: ((lanes, tasks),))
    task = entry.make()
    repeat(task, 3 * lanes)
    got = metafast_gradients(inner_loop(task, backend, steps=3, order=2), task, way)[1]
    assert_same(got, named(exact_answer(entry, 2, 3, torch.float64, False)))


@pytest.mark.shows("keep")
def test_what_is_kept_is_not_computed_again() -> None:
    plan = plan_of()
    with_them, without = plan.program("fused", steps=3), plan.program("fused", steps=10**6)
    assert plan.keeps("fused", 3, 1) and not plan.keeps("fused", 10**6, 1)
    assert products(with_them, "inner") == products(without, "inner")
    # Three products forward, and the cotangent of the middle layer's output that the first one's gradient needs.
    assert products(without, "meta") - products(with_them, "meta") == 4
    assert with_them.state_bytes > without.state_bytes


@pytest.mark.shows("keep")
def test_only_as_much_as_the_cache_holds() -> None:
    plan = plan_of()
    elements = keep(plan.sections("fused", 10**6))[1]
    assert elements == 4 * (20 + 20 + 3 + 20)
    steps = MOST_KEPT_BYTES // (8 * elements) - 1
    assert plan.keeps("fused", steps, 1) and not plan.keeps("fused", steps + 1, 1)
    assert plan.keeps("fused", (steps + 1) // 4 - 1, 4) and not plan.keeps("fused", steps, 4)


@pytest.mark.shows("keep")
def test_more_where_states_are_much_larger_but_not_without_bound() -> None:
    plan = plan_of(width=200)
    assert plan.keeps("fused", 100, 1)
    assert not plan.keeps("fused", 10**6, 1)


def test_nothing_to_keep() -> None:
    assert not plan_of().keeps("fused", 0, 1)
    assert not plan_of().keeps("forward", 3, 1)
    assert not plan_of(order=1).keeps("fused", 3, 1)  # the support gradient is a constant
