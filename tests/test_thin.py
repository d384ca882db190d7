"""A few steps as one section, where matrices that are sums of thin products are not made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import WAYS_OUT, answer, assert_same, inner_loop, metafast_gradients, named
from torch import nn
from zoo import ENTRIES, LR, Entry, Task
from zoo import named as entry_named

import metafast
from metafast import dispatch
from metafast.budget import interval, slots
from metafast.graph import Builder, Graph, evaluate
from metafast.native import Plan, captured, make_plan
from metafast.passes import without
from metafast.sweep import Section, Store
from metafast.thin import may_pay, thin

pytest.importorskip("metafast._C", reason="the native backend is not built", exc_type=ImportError)

WIDE, ROWS, TASKS = 192, 3, 2


class Tied(nn.Module):
    """One matrix used twice, the second time turned, with nothing between."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDE, WIDE) / WIDE**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.weight).tanh() @ self.weight, self.weight)


def mlp(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDE, WIDE), *between, nn.Linear(WIDE, WIDE), nn.Tanh(), nn.Linear(WIDE, 5))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: mlp(nn.ReLU()),
    "linear": lambda: mlp(),
    "batch_norm": lambda: mlp(nn.BatchNorm1d(WIDE), nn.ReLU()),
    "tied": Tied,
}


def task_of(name: str, dtype: torch.dtype = torch.float64) -> Task:
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    out = WIDE if name == "tied" else 5

    def batch(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.randn(TASKS, rows, WIDE, dtype=dtype), torch.randn(TASKS, rows, out, dtype=dtype)

    return Task(model, batch(ROWS), batch(ROWS + 4), loss=F.mse_loss)


def plan_of(task: Task, steps: int, order: int = 2, update: metafast.UpdateRule | None = None) -> Plan:
    inner = inner_loop(task, "native", update or metafast.SGD(lr=0.1), steps=steps, order=order)
    problem = inner._problem(task.support, task.query, gradient=True)[0]
    return make_plan(problem, captured(problem))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("way", WAYS_OUT)
def test_meta_gradients(name: str, learned: bool, order: int, steps: int, way: str) -> None:
    """And running statistics. A learned rate needs the gradient itself."""
    task = task_of(name)
    expected = answer(task, order, steps)
    inner = inner_loop(task, "native", None if learned else metafast.SGD(lr=LR), steps=steps, order=order)
    loss, got = metafast_gradients(inner, task, way)
    torch.testing.assert_close(loss, expected.losses.mean(), rtol=1e-11, atol=0.0)
    assert_same(got, _wanted(expected, learned))
    for buffer, value in task.model.named_buffers() if way == "fused" else ():
        torch.testing.assert_close(value, expected.buffers[buffer], rtol=1e-10, atol=1e-12)


def _wanted(expected: Any, learned: bool) -> dict[str, torch.Tensor]:
    return {name: g for name, g in named(expected).items() if learned or not name.startswith("hyper")}


class Decay(metafast.SGD):
    """The weights shrink as they move: still a sum of products."""

    def update(self, params: Any, grads: Any, state: Any, hyper: Any, k: Any, params0: Any) -> Any:
        made, state = super().update(params, grads, state, hyper, k, params0)
        return {name: p - 0.1 * params[name] for name, p in made.items()}, state


class Momentum(metafast.SGD):
    """So is a state that is handed on."""

    def init(self, params: Any, hyper: Any) -> Any:
        return {name: 0.5 * p for name, p in params.items()}

    def update(self, params: Any, grads: Any, state: Any, hyper: Any, k: Any, params0: Any) -> Any:
        state = {name: 0.9 * state[name] + g for name, g in grads.items()}
        return {name: p - hyper["lr"] * state[name] for name, p in params.items()}, state


class Signs(metafast.SGD):
    """No sum of products; the rate depends on the step."""

    def update(self, params: Any, grads: Any, state: Any, hyper: Any, k: Any, params0: Any) -> Any:
        grads = {name: g.tanh() / (k + 1) for name, g in grads.items()}
        return super().update(params, grads, state, hyper, k, params0)


RULES = [Decay, Momentum, Signs]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [1, 3])
def test_rules(rule: type[metafast.SGD], order: int, steps: int) -> None:
    found = []
    for backend in ("torch", "native"):
        task = task_of("mlp")
        inner = inner_loop(task, backend, rule(lr=0.05), steps=steps, order=order)
        found.append(metafast_gradients(inner, task, "fused"))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-10, atol=0.0)
    assert_same(found[1][1], found[0][1])


@pytest.mark.shows("thin")
def test_which_rules_leave_sums_of_products() -> None:
    made = {rule.__name__: plan_of(task_of("mlp"), 1, update=rule(lr=0.1)).unrolled("fused", 1) for rule in RULES}
    assert [name for name, lowered in made.items() if lowered is not None] == ["Decay", "Momentum"]


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_every_model(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    """However little it pays."""
    monkeypatch.setattr("metafast.thin._TERM", -1e12)
    monkeypatch.setattr("metafast.native.MOST_UNROLLED", 1 << 30)
    monkeypatch.setattr("metafast.native.Plan.spares_memory", lambda *_: True, raising=True)
    monkeypatch.setattr("metafast.native.divided", lambda state, itemsize, tasks, work: ((1, tasks),))
    task = entry.make()
    expected = answer(task, 2, 2)
    if entry.name in ("mlp_relu", "attention", "mlp_layer_norm"):
        assert plan_of(task, 2).unrolled("fused", 2) is not None
    inner = inner_loop(task, "native", metafast.SGD(lr=LR), steps=2, order=2)
    assert_same(metafast_gradients(inner, task, "fused")[1], _wanted(expected, False))
    for buffer, value in task.model.named_buffers():
        torch.testing.assert_close(value, expected.buffers[buffer], rtol=1e-10, atol=1e-12)


def test_losses_of_every_step() -> None:
    found = []
    for backend in ("torch", "native"):
        task = task_of("mlp")
        inner = inner_loop(task, backend, metafast.SGD(lr=0.1), steps=3)
        inner.reduction = "none"
        problem, outline = inner._problem(task.support, task.query, gradient=True)
        chosen = dispatch.choose(problem, backend)
        found.append(chosen.meta_gradient(problem, outline.weights(problem), fold=False).step_losses)
    assert found[0] is not None and found[0].shape == (TASKS, 3)
    torch.testing.assert_close(found[1], found[0], rtol=1e-10, atol=0.0)


@pytest.mark.parametrize("nonfinite", ["support", "query"])
def test_a_loss_that_is_not_finite_is_found_at_its_step(nonfinite: str) -> None:
    task = task_of("mlp")
    inner = inner_loop(task, "native", metafast.SGD(lr=0.1), steps=2, nonfinite="raise")
    inner.meta_gradient(task.support, task.query)
    batch = {"support": task.support, "query": task.query}[nonfinite]
    batch[1][1, 0] = float("inf")
    place = {"support": "task 1, inner step 0", "query": "task 1, query"}[nonfinite]
    with pytest.raises(metafast.errors.NonFiniteError, match=place):
        inner.meta_gradient(task.support, task.query)


# ---- where -----------------------------------------------------------------------------------------------------


@pytest.mark.shows("thin")
def test_wide_layers_are_not_written() -> None:
    """No instruction writes fast weights or an adjoint of them: a matrix is read, and its gradient added up."""
    (portion,) = plan_of(task_of("mlp"), 2).best("fused", TASKS, 2)
    code = portion.lowered.code
    assert set(code) == {"query"}
    large = [ins.operands[k] for ins in code["query"] for k in ins.writes if ins.operands[k].shape == (1, WIDE, WIDE)]
    assert large and all(a.buffer.space == 5 for a in large)


def test_where_it_does_not_pay() -> None:
    """Many steps, a rule of no products, small nets, and a pass that is left out."""
    assert plan_of(task_of("mlp"), 1000).unrolled("fused", 1000) is None
    assert plan_of(task_of("mlp"), 0).unrolled("fused", 0) is None
    assert plan_of(task_of("mlp"), 2, update=Signs(lr=0.1)).unrolled("fused", 2) is None
    small = entry_named("mlp_relu").make()
    assert plan_of(small, 2).unrolled("fused", 2) is None
    with without("thin"):
        assert plan_of(task_of("mlp"), 2).unrolled("fused", 2) is None


def test_no_budget_is_too_small_and_none_changes_a_bit() -> None:
    found = []
    for most in (None, 1):
        task = task_of("mlp")
        inner = inner_loop(task, "native", metafast.SGD(lr=0.1), steps=2, memory_budget=most)
        found.append(metafast_gradients(inner, task, "fused")[1])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_memory_is_no_more_than_the_fewest_states_took() -> None:
    for steps in (1, 3):
        plan = plan_of(task_of("mlp"), steps)
        made = plan.unrolled("fused", steps)
        assert made is not None
        rolled = plan.program("fused", steps)
        fewest = slots(steps, interval(steps, 0))
        assert made.state_bytes == 0 and made.arena_bytes <= rolled.arena_bytes + fewest * rolled.state_bytes


def test_a_wrong_label_is_found() -> None:
    """In the step and the task that it is of."""
    torch.manual_seed(0)
    x, y = torch.randn(TASKS, ROWS, WIDE), torch.zeros(TASKS, ROWS, dtype=torch.long)
    inner = metafast.InnerLoop(mlp(nn.ReLU()), F.cross_entropy, update=metafast.SGD(lr=0.1), steps=2, backend="native")
    inner.meta_gradient((x, y), (x, y))
    wrong = y.clone()
    wrong[1, 0] = 9
    with pytest.raises(metafast.errors.LabelError, match=r"task 1, support labels.*label 9"):
        inner.meta_gradient((x, wrong), (x, y))
    with pytest.raises(metafast.errors.LabelError, match=r"task 1, query labels.*label 9"):
        inner.meta_gradient((x, y), (x, wrong))


@pytest.mark.parametrize("threads", [2, 3])
def test_bits_do_not_depend_on_threads(threads: int) -> None:
    found = []
    for n in (1, threads):
        torch.set_num_threads(n)
        try:
            task = task_of("mlp", torch.float32)
            found.append(metafast_gradients(inner_loop(task, "native", steps=2), task, "fused")[1])
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


# ---- the graph --------------------------------------------------------------------------------------------------


def _rewritten(write: Callable[[Builder, Any], Any]) -> tuple[Graph, Graph | None]:
    b = Builder()
    shapes = {"w": (96, 96), "p": (96, 2), "q": (2, 96), "x": (4, 96), "s": ()}
    out = write(b, {n: b.input("leaf", n, shape) for n, shape in shapes.items()})
    graph = b.finish({"out": out})
    made = thin(Section(graph, (Store("out", "gradient", "out", add=True),)))
    return graph, made.graph if made else None


SUMS: dict[str, Callable[[Builder, Any], Any]] = {
    "difference": lambda b, v: b.op("sub", v["w"], b.op("mul", v["s"], b.op("matmul", v["p"], v["q"]))),
    "turned": lambda b, v: b.op("permute", SUMS["difference"](b, v), dims=(1, 0)),
    "negative": lambda b, v: b.op("neg", b.op("add", SUMS["difference"](b, v), v["w"])),
    "from": lambda b, v: b.op("sub", b.op("matmul", v["p"], v["q"]), SUMS["turned"](b, v)),
}


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_rewriting(name: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metafast.thin._TERM", 0.0)

    def write(b: Builder, v: Any) -> Any:
        matrix, x = SUMS[name](b, v), v["x"]
        if side == "right":
            return b.op("matmul", x, matrix)
        if side == "left":
            return b.op("matmul", matrix, b.op("permute", x, dims=(1, 0)))
        return b.op("matmul", b.op("matmul", x, matrix), matrix)

    before, after = _rewritten(write)
    assert after is not None
    values = {("leaf", i.name): torch.randn(i.value.shape, dtype=torch.float64) for i in before.inputs}
    torch.testing.assert_close(evaluate(after, values)["out"], evaluate(before, values)["out"], rtol=1e-11, atol=1e-10)
    assert not any(n.outputs[0].shape == (96, 96) and n.op in ("matmul", "sub", "add") for n in after.nodes)


def test_what_something_else_reads_is_made() -> None:
    """A penalty on the fast weights themselves."""

    def write(b: Builder, v: Any) -> Any:
        matrix = SUMS["difference"](b, v)
        penalty = b.op("sum", b.op("square", matrix), dims=(0, 1))
        return b.op("mul", penalty, b.op("matmul", v["x"], matrix))

    assert _rewritten(write)[1] is None


def test_who_finds_a_sum_is_told_that_it_may() -> None:
    """By shapes alone, whatever they are; and most nets whose layers are narrow are told that it can't."""
    random = torch.Generator().manual_seed(0)
    told = []
    for _ in range(300):
        m, n, rank, rows = (2 ** torch.empty(4).uniform_(0, 9, generator=random)).int().tolist()
        b = Builder()
        w, x = b.input("leaf", "w", (m, n)), b.input("leaf", "x", (rows, m))
        product = b.op("matmul", b.input("leaf", "p", (m, rank)), b.input("leaf", "q", (rank, n)))
        section = Section(b.finish({"out": b.op("matmul", x, b.op("sub", w, product))}), (Store("out", "fast", "out"),))
        told.append(may_pay([section]))
        assert thin(section) is None or told[-1]
    assert 10 < sum(told) < 200
