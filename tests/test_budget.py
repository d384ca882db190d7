"""`InnerLoop(memory_budget=...)`: fewer states held, the same bits."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import data, loop, mlp
from parity import WAYS_OUT, collected, inner_loop, metafast_gradients, vector
from test_lanes import repeat
from test_update_rules import RULES, Rule, learned
from torch import nn
from torch.utils import _pytree as pytree
from zoo import ENTRIES, Entry, Task
from zoo import named as entry_named

import metafast
from metafast import dispatch, native
from metafast.budget import held, interval, slots
from metafast.errors import InputError, InputTypeError, NonFiniteError, NonFiniteWarning
from metafast.outline import NO_QUERY
from metafast.passes import without

_C = pytest.importorskip("metafast._C", reason="the native backend is not built", exc_type=ImportError)

STEPS = 10  # 11 states; 7 with every second held, 6 with every third
INTERVALS = [1, 2, 3]


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def states() -> Iterator[None]:
    """Programs that hold states; those of one section hold none (test_thin.py)."""
    with without("thin"):
        yield


def budget(inner: metafast.InnerLoop, support: Any, query: Any, every: int) -> int:
    """The least budget for states of every so many steps; without a query that of `adapt`."""
    problem = inner._problem(support, NO_QUERY if query is None else query, gradient=True)[0]
    plan = dispatch.choose(problem, "native").plan  # type: ignore[attr-defined]
    mode = "adapt_vjp" if query is None else "outputs" if inner.return_outputs else "fused"
    found = held(plan.best(mode, problem.tasks, problem.steps), problem)
    return found.workers * slots(problem.steps, every) * found.slot_bytes


def used(inner: metafast.InnerLoop) -> set[int]:
    """Of every how many steps states were held in calls that come back to them."""
    plans = [choice.backend.plan for choice in dispatch._plans[inner.model].values()]
    programs = [lowered for plan in plans for lowered in plan.programs.values() if lowered.returns]
    return {every for lowered in programs for *_, steps, every in lowered.forms if steps}


# ---- how many states ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4, 10, 63, 64, 65, 100])
def test_the_least_interval_that_fits(steps: int) -> None:
    every = range(1, max(steps, 1) + 1)
    fewest = min(slots(steps, n) for n in every)
    for most in range(fewest, steps + 2):
        assert interval(steps, most) == min(n for n in every if slots(steps, n) <= most)
    assert slots(steps, interval(steps, fewest - 1)) == fewest
    assert fewest <= 2 * (steps + 1) ** 0.5


# ---- the same bits --------------------------------------------------------------------------------------------


def check(make: Callable[[], tuple[metafast.InnerLoop, Task]], way: str) -> None:
    """Fresh models, all but the first with a budget, give the same loss and gradients."""
    found, intervals = [], []
    for every in (None, *INTERVALS):
        inner, task = make()
        if every is not None:
            query = task.query if way == "fused" else None
            inner.memory_budget = budget(inner, task.support, query, every)
        loss, gradients = metafast_gradients(inner, task, way)
        found.append(torch.cat([loss.double().reshape(1), vector(gradients)]))
        intervals += used(inner)
    assert intervals == [1, *INTERVALS]
    assert found[0].isfinite().all()
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("way", WAYS_OUT)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_models(entry: Entry, dtype: torch.dtype, order: int, way: str) -> None:
    def make() -> tuple[metafast.InnerLoop, Task]:
        task = entry.make(dtype)
        return inner_loop(task, "native", steps=STEPS, order=order), task

    check(make, way)


@pytest.mark.parametrize("way", WAYS_OUT)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.name)
@pytest.mark.parametrize("model", ["mlp_gelu", "conv4_max_pool"])
def test_update_rules(model: str, rule: Rule, order: int, way: str) -> None:
    def make() -> tuple[metafast.InnerLoop, Task]:
        task = entry_named(model).make()
        return inner_loop(task, "native", update=learned(rule, task), steps=STEPS, order=order), task

    check(make, way)


@pytest.mark.parametrize("way", WAYS_OUT)
@pytest.mark.parametrize("name", ["mlp_gelu", "sinusoid", "mlp_layer_norm"])
def test_tasks_side_by_side(name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metafast.native.divided", lambda state, item, tasks, _: ((_C.vector_bytes() // item, tasks),))

    def make() -> tuple[metafast.InnerLoop, Task]:
        task = entry_named(name).make(torch.float32)
        repeat(task, 3 * _C.vector_bytes() // 4)
        return inner_loop(task, "native", steps=STEPS), task

    check(make, way)


@pytest.mark.parametrize("kept", [0, 1 << 40], ids=["nothing kept", "products kept"])
def test_products(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that a step keeps lie with the state behind it, be that one held or made again."""
    monkeypatch.setattr("metafast.steps.MOST_KEPT_BYTES", kept)
    monkeypatch.setattr("metafast.steps.LITTLE", 1 << 40)

    def make() -> tuple[metafast.InnerLoop, Task]:
        task = entry_named("residual").make()
        return inner_loop(task, "native", steps=STEPS), task

    check(make, "fused")


@pytest.mark.parametrize("tasks", [1, 3, 19])
def test_any_number_of_threads(tasks: int) -> None:
    found = []
    for threads, every in itertools.product((1, 2, 4), INTERVALS):
        torch.set_num_threads(threads)
        task = entry_named("conv4_max_pool").make(torch.float32)
        batches = task.support, task.query
        task.support, task.query = pytree.tree_map(lambda t: t[:1].expand(tasks, *t.shape[1:]), batches)
        inner = inner_loop(task, "native", steps=STEPS)
        inner.memory_budget = budget(inner, task.support, task.query, every)
        found.append(vector(metafast_gradients(inner, task, "fused")[1]))
        assert used(inner) == {every}
    assert all(torch.equal(found[0], other) for other in found)


# ---- what a call gives besides ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"reduction": "none"}, {"return_outputs": True}, {"reduction": "sum"}], ids=str)
def test_deferred_calls_and_running_statistics(options: dict[str, Any]) -> None:
    """Losses, outputs, gradients, and statistics that are folded once however often a step is made."""
    found = []
    for every in INTERVALS:
        task = entry_named("conv4_max_pool").make()
        inner = inner_loop(task, "native", steps=STEPS, **options)
        before = [b.clone() for b in task.model.buffers()]
        inner.memory_budget = budget(inner, task.support, task.query, every)
        made = pytree.tree_leaves(inner(task.support, task.query))
        sum((t.sin() * torch.arange(1.0, t.numel() + 1).reshape(t.shape)).sum() for t in made).backward()
        assert used(inner) == {every}
        after = list(task.model.buffers())
        assert not all(map(torch.equal, before, after))
        found.append([*made, vector(collected(inner, task)), *after])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


def test_the_losses_of_steps() -> None:
    found = []
    for every in (*INTERVALS, None):
        inner = loop(mlp(), "native", steps=STEPS, reduction="none")
        problem, outline = inner._problem(data(0), data(1), gradient=True)
        inner.memory_budget = every and budget(inner, data(0), data(1), every)
        problem, outline = inner._problem(data(0), data(1), gradient=True)
        outcome = dispatch.choose(problem, "native").meta_gradient(problem, outline.weights(problem), fold=False)
        assert outcome.step_losses is not None and outcome.step_losses.shape == (3, STEPS)
        found.append(outcome.step_losses)
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("every", INTERVALS)
def test_a_loss_that_is_not_finite_is_found_once_at_its_step(every: int) -> None:
    (x, y), query = data(0), data(1)
    inner = loop(mlp(), "native", loss=lambda out, y: F.cross_entropy(out, y).exp().exp(), steps=STEPS)
    inner.update.lr = 1e3
    inner.memory_budget = budget(inner, (x, y), query, every)
    with pytest.warns(NonFiniteWarning, match="task 0, inner step 1") as caught:
        inner((x, y), query)
    assert len(caught) == 1 and used(inner) == {every}
    inner.nonfinite = "raise"
    with pytest.raises(NonFiniteError, match="task 0, inner step 1"):
        inner((x, y), query)


def test_transforms() -> None:
    found = []
    for every in INTERVALS:
        inner = loop(mlp(), "native", steps=STEPS)
        inner.memory_budget = budget(inner, data(0), data(1), every)
        x, y = data(0)
        found.append(torch.func.grad(lambda x, y, inner=inner: inner((x, y), data(1)))(x, y))
        assert used(inner) == {every}
    assert found[0].any() and all(torch.equal(found[0], other) for other in found)


def test_profile_counts_what_runs_again() -> None:
    inner = loop(mlp(), "native", steps=STEPS)
    inner.memory_budget = budget(inner, data(0), data(1), 3)
    calls = {row.section: row.calls for row in inner.profile(data(0), data(1), repeats=1).rows}
    again = 3 * 2  # three segments but the last, of two steps each
    assert calls["inner"] == 3 * (STEPS + again) and calls["meta"] == 3 * STEPS


# ---- the option ---------------------------------------------------------------------------------------------------


def test_explain_says_what_was_chosen() -> None:
    inner = loop(mlp(), "native", steps=STEPS)

    def states() -> str:
        return next(line for line in inner.explain(data(0), data(1)).splitlines() if line.startswith("states: "))

    size = budget(inner, data(0), data(1), 1) // (2 * 11)
    assert size >= 8 * sum(p.numel() for p in inner.parameters())
    all_of_them = f"states: of every step, 11 × {size} B × 2 threads = {22 * size} B"
    assert states() == f"{all_of_them} (memory_budget=None)"
    inner.memory_budget = 13 * size
    assert states() == f"states: of one step in 3, 6 × {size} B × 2 threads = {12 * size} B (memory_budget={13 * size})"
    inner.model[0], inner.model[2] = nn.Linear(6, 20).double(), nn.Sequential(nn.Linear(20, 20), nn.Tanh()).double()
    inner.memory_budget = None
    assert states().endswith(" B, with products (memory_budget=None)")


def test_a_budget_that_nothing_fits() -> None:
    inner = loop(mlp(), "native", steps=STEPS)
    least = budget(inner, data(0), data(1), 3)
    inner.memory_budget = least - 1
    text = rf"memory_budget=.*\), 10 steps: got {least - 1} bytes, expected {least} or more: 6 states of .*; allow "
    for call in (inner, inner.meta_gradient, inner.profile, inner.explain):
        with pytest.raises(InputError, match=text):
            call(data(0), data(1))
    inner.memory_budget = least
    inner(data(0), data(1)).backward()


@pytest.mark.parametrize("options", [{"reduction": "none"}, {"return_outputs": True}], ids=str)
def test_a_deferred_call_refuses_before_it_runs(options: dict[str, Any]) -> None:
    task = entry_named("conv4_max_pool").make()
    inner = inner_loop(task, "native", steps=STEPS, memory_budget=1, **options)
    before = [b.clone() for b in task.model.buffers()]
    with pytest.raises(InputError, match=r"memory_budget=.* got 1 bytes"):
        inner(task.support, task.query)
    with pytest.raises(InputError, match=r"memory_budget=.* got 1 bytes"):
        inner.adapt(task.support)
    assert all(map(torch.equal, before, task.model.buffers()))


def test_a_call_without_gradient_holds_two_states() -> None:
    inner = loop(mlp(), "native", steps=STEPS)
    inner.memory_budget = budget(inner, data(0), data(1), 1) * 2 // 11
    with pytest.raises(InputError, match="6 states"):
        inner(data(0), data(1))
    with torch.no_grad():
        assert inner(data(0), data(1)).isfinite()


def test_it_may_be_set_between_calls_and_makes_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = loop(mlp(), "native", steps=STEPS)
    inner(data(0), data(1))
    monkeypatch.setattr(native, "make_plan", lambda problem: pytest.fail("another plan"))
    assert used(inner) == {1}
    inner.memory_budget = budget(inner, data(0), data(1), 2)
    inner(data(0), data(1))
    assert used(inner) == {1, 2}
    inner.memory_budget = budget(inner, data(0), data(1), 3)
    torch.set_num_threads(1)  # one thread may hold as much as two: 12 states
    inner(data(0), data(1))
    assert used(inner) == {1, 2}
    torch.set_num_threads(2)
    inner(data(0), data(1))
    assert used(inner) == {1, 2, 3}


@pytest.mark.parametrize("steps", [0, 1])
def test_few_steps(steps: int) -> None:
    inner = loop(mlp(), "native", steps=steps)
    inner.memory_budget = budget(inner, data(0), data(1), 1)
    assert torch.equal(inner(data(0), data(1)), loop(mlp(), "native", steps=steps)(data(0), data(1)))


def test_pickle_copy_and_repr() -> None:
    inner = loop(mlp(), "native")
    assert "memory_budget" not in repr(inner)
    inner.memory_budget = 1 << 20
    assert "memory_budget=1048576" in repr(inner)
    for twin in (pickle.loads(pickle.dumps(inner)), copy.deepcopy(inner)):
        assert twin.memory_budget == 1 << 20


def test_pytorch_has_no_budget() -> None:
    assert loop(mlp(), "torch", memory_budget=1)(data(0), data(1)).isfinite()


@pytest.mark.parametrize("value", [0, -5])
def test_values(value: int) -> None:
    with pytest.raises(InputError, match=r"memory_budget=...\): got .*, expected 1 or more; pass e.g. 512 \* 2\*\*20"):
        loop(mlp(), memory_budget=value)


@pytest.mark.parametrize("value", [1e9, True, "512MiB"])
def test_types(value: Any) -> None:
    with pytest.raises(InputTypeError, match=r"memory_budget=...\): got .*, expected an int, in bytes, or None"):
        loop(mlp(), memory_budget=value)
