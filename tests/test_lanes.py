"""Tasks side by side: what an interleaved program computes is what the plain one does, for every way to run."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pytest
import test_invariants
import torch
import torch.nn.functional as F
from parity import WAYS_OUT, assert_same, exact_answer, inner_loop, metafast_gradients, named, require
from test_random_graphs import Writer
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import ENTRIES, Entry
from zoo import named as entry_named

import metafast
from metafast import dispatch
from metafast.cost import Work
from metafast.division import Division, _quickest, divided
from metafast.errors import LabelError
from metafast.graph import Builder, Graph, copy_into, evaluate
from metafast.lower import NotInterleaved
from metafast.lower.interleave import Interleaving
from metafast.sweep import Section, Store

pytest.importorskip("metafast._C", reason="the native backend is not built", exc_type=ImportError)

LANED = ["mlp_relu", "mlp_tanh_sigmoid", "mlp_gelu", "mlp_silu_softplus", "mlp_elu_leaky", "mlp_layer_norm", "in_place",
         "skip_connections", "tied_weights", "closure_constants", "pointwise", "sinusoid", "huber", "l1_and_smooth_l1",
         "binary", "weighted_cross_entropy", "soft_targets", "wide_linear"]  # fmt: skip


def in_blocks(lanes: int, tasks: int) -> Division:
    """As many blocks as are full, and the rest."""
    full = tasks // lanes * lanes
    return tuple(pair for pair in ((lanes, full), (1, tasks - full)) if pair[1])


def one_in_a_block(lanes: int, tasks: int) -> Division:
    """One block, and the rest; of fewer tasks the last by itself, by the same program as the others."""
    if tasks > lanes:
        return ((lanes, lanes), (1, tasks - lanes))
    return ((1, tasks - 1), (1, 1)) if tasks > 1 else ((1, 1),)


@pytest.fixture(params=[in_blocks, one_in_a_block])
def side_by_side(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """How any number of tasks, of any size, is divided."""
    from metafast import _C

    how = request.param
    monkeypatch.setattr("metafast.native.divided", lambda state, item, tasks, _: how(_C.vector_bytes() // item, tasks))
    return how


def lanes_of(model: nn.Module) -> set[int]:
    """How many tasks at once the programs of a model do that have run."""
    plans = [choice.backend.plan for choice in dispatch._plans[model].values()]
    return {portion.lowered.lanes for plan in plans for portions in plan._best.values() for portion in portions}


# ---- the pass ---------------------------------------------------------------------------------------------------


class FlatWriter(Writer):
    """Graphs of vectors and matrices alone, with the ops that have a form for tasks side by side."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.values = [v for v in self.values if len(v.shape) <= 2]

    def step(self) -> None:
        kinds = [self.unary, self.binary, self.view, self.cut, self.total, self.select, self.join]
        made = self.rng.choice([*kinds, self.product, self.normalise, self.softmax])()
        if made is not None and len(made.shape) <= 2 and 0 < torch.Size(made.shape).numel() <= 500:
            self.values.append(made)


def as_section(graph: Graph) -> Section:
    """The graph as a section: odd arguments differ from task to task, even ones are shared."""
    b = Builder()

    def bind(i: Any) -> Any:
        leaf = f"query/{i.role}{i.name}" if int(i.name) % 2 else f"param/{i.role}{i.name}"
        return b.input("leaf", leaf, i.value.shape, i.value.dtype)

    env = copy_into(b, graph, bind)
    outputs = {name: env[v] for name, v in graph.outputs.items()}
    return Section(b.finish(outputs), tuple(Store(name, "output", name) for name in outputs))


@pytest.mark.parametrize("seed", range(60))
def test_each_lane_is_one_task(seed: int) -> None:
    lanes, section = 3, as_section(FlatWriter(seed).graph())
    made = Interleaving(lanes).section(section)
    draw = torch.Generator().manual_seed(seed)
    values: dict[tuple[str, str], Tensor] = {}
    for i in section.graph.inputs:
        shape = (*i.value.shape, lanes) if i.name.startswith("query/") else i.value.shape
        values[i.role, i.name] = torch.randn(shape, generator=draw, dtype=torch.float64)
    got = evaluate(made.graph, {(i.role, i.name): values[i.role, i.name] for i in made.graph.inputs})
    for lane in range(lanes):
        for name, expected in evaluate(section.graph, _of_lane(values, lane)).items():
            torch.testing.assert_close(got[name][..., lane], expected, rtol=1e-9, atol=1e-9)


def _of_lane(values: Mapping[tuple[str, str], Tensor], lane: int) -> dict[tuple[str, str], Tensor]:
    return {key: v[..., lane] if key[1].startswith("query/") else v for key, v in values.items()}


def test_what_has_no_such_form_is_refused() -> None:
    b = Builder()
    x, w = b.input("leaf", "query/0", (1, 2, 6, 6)), b.input("leaf", "param/w", (3, 2, 3, 3))
    pairs = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)}
    section = Section(b.finish({"y": b.op("conv2d", x, w, **pairs)}), (Store("y", "output", "y"),))
    with pytest.raises(NotInterleaved, match="conv2d"):
        Interleaving(8).section(section)


# ---- meta-gradients ---------------------------------------------------------------------------------------------


@pytest.mark.shows("lanes")
@pytest.mark.parametrize("entry", ENTRIES, ids=str)
@pytest.mark.parametrize("way", WAYS_OUT)
@pytest.mark.parametrize("steps", [0, 1, 3])
@pytest.mark.parametrize("order", [1, 2])
def test_float64(entry: Entry, order: int, steps: int, way: str, side_by_side: Any) -> None:
    """The tasks of the zoo, each as often as there are lanes; nets that cannot lie side by side run as ever."""
    task = entry.make()
    lanes = metafast._C.vector_bytes() // 8
    repeat(task, 3 * lanes)
    inner = inner_loop(task, require("native"), steps=steps, order=order)
    loss, got = metafast_gradients(inner, task, way)
    expected = exact_answer(entry, order, steps, torch.float64, False)
    torch.testing.assert_close(loss, expected.losses.mean(), rtol=1e-12, atol=0.0)
    assert_same(got, named(expected))
    divided_in = {lanes for lanes, _ in side_by_side(lanes, 3 * lanes)} if str(entry) in LANED else {1}
    assert lanes_of(task.model) == divided_in


def repeat(task: Any, tasks: int) -> None:
    again = functools.partial(test_invariants._repeat, tasks=tasks)
    task.support, task.query = pytree.tree_map(again, (task.support, task.query))


def classifier(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def batch(tasks: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(tasks)
    x = torch.randn(tasks, 6, 4, generator=draw, dtype=torch.float64).to(dtype)
    return x, torch.arange(6).remainder(3).expand(tasks, 6).contiguous()


class Momentum:
    """μ and the rate are learned; the state is one velocity a parameter."""

    def __new__(cls) -> metafast.UpdateRule:
        def init(params: Any, hyper: Any) -> Any:
            return {n: torch.zeros_like(p) for n, p in params.items()}

        def update(params: Any, grads: Any, state: Any, hyper: Any, k: Any, params0: Any) -> Any:
            norm = torch.sqrt(sum((g * g).sum() for g in grads.values()))
            scale = torch.clamp(1.0 / norm, max=1.0)
            state = {n: hyper["mu"] * v + scale * grads[n] for n, v in state.items()}
            return {n: p - hyper["lr"] * state[n] / (1.0 + 0.1 * k) for n, p in params.items()}, state

        double = {"dtype": torch.float64}
        return metafast.UpdateRule(
            init, update, lr=nn.Parameter(torch.tensor(0.3, **double)), mu=nn.Parameter(torch.tensor(0.5, **double))
        )


@pytest.mark.shows("lanes")
@pytest.mark.parametrize("tasks", [1, 4, 9])
def test_every_way_to_ask(tasks: int, side_by_side: Any) -> None:
    """State, labels, running statistics, outputs, gradients in the data and losses task by task, beside PyTorch."""
    found = []
    for backend in ("torch", "native"):
        model = classifier()
        inner = metafast.InnerLoop(
            model, F.cross_entropy, update=Momentum(), steps=2, reduction="none", return_outputs=True, backend=backend
        )
        (x, y), (xq, yq) = batch(tasks), batch(tasks + 1)
        x, xq = x.requires_grad_(), xq[:tasks].requires_grad_()
        losses, outputs = inner((x, y), (xq, yq[:tasks]))
        (losses * torch.linspace(0.5, 2.0, tasks)).sum().add((outputs**2).sum()).backward()
        fast = inner.adapt((x, y))
        sum((f * f).sum() for f in fast.values()).backward()
        found.append([losses, outputs, *fast.values(), x.grad, xq.grad, *(p.grad for p in inner.parameters())])
        found[-1] += list(model.buffers())
    assert lanes_of(model) == {lanes for lanes, _ in side_by_side(metafast._C.vector_bytes() // 8, tasks)}
    for eager, native in zip(*found, strict=True):
        torch.testing.assert_close(native, eager, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("side_by_side")
def test_a_wrong_label_is_found_in_its_task() -> None:
    x, y = batch(11, torch.float32)
    y[6, 2] = 3
    inner = metafast.InnerLoop(classifier(torch.float32), F.cross_entropy, update=metafast.SGD(lr=0.1), steps=1)
    with pytest.raises(LabelError, match="task 6, support labels"):
        inner((x, y), batch(11, torch.float32))


@pytest.mark.shows("lanes")
def test_maxima_and_computed_labels(side_by_side: Any) -> None:
    """The portion of right answers weighs the loss; the labels count from 1."""

    def objective(m: nn.Module, batch: Any) -> Tensor:
        logits, target = m(batch[0]), batch[1] - 1
        right = (logits.argmax(1) == target).to(logits.dtype).mean()
        return F.cross_entropy(logits - logits.amax(1, keepdim=True) / 2 + logits.max(0)[0], target) * (1 + right)

    (x, y), (xq, yq) = batch(11), batch(12)
    support, query = (x, y + 1), (xq[:11], yq[:11] + 1)
    found = []
    for backend in ("torch", "native"):
        model = classifier()
        inner = metafast.InnerLoop(model, objective=objective, update=metafast.SGD(lr=0.1), steps=2, backend=backend)
        found.append(inner.meta_gradient(support, query)[1])
    assert lanes_of(model) == {lanes for lanes, _ in side_by_side(metafast._C.vector_bytes() // 8, 11)}
    assert_same(found[1], found[0])
    query[1][6, 2] = 4
    with pytest.raises(LabelError, match=r"task 6, query labels.*a computed label"):
        inner(support, query)


@pytest.mark.usefixtures("side_by_side")
def test_a_loss_that_is_not_finite_is_found_in_its_task() -> None:
    x, y = batch(11, torch.float32)
    x[9, 0] = float("inf")
    inner = metafast.InnerLoop(classifier(torch.float32), F.cross_entropy, update=metafast.SGD(lr=0.1), steps=1)
    with pytest.warns(metafast.NonFiniteWarning, match="task 9"):
        inner((x, y), batch(11, torch.float32))


@pytest.mark.usefixtures("side_by_side")
@pytest.mark.parametrize("way", WAYS_OUT)
@pytest.mark.parametrize("tasks", [1, 3, 150])
def test_same_bits_on_any_number_of_threads(way: str, tasks: int) -> None:
    found = []
    for threads in (1, 2, 4):
        with test_invariants.torch_threads(threads):
            found.append(test_invariants.bits("mlp_relu", "native", way, tasks))
    assert found[0] == found[1] == found[2]


@pytest.mark.shows("lanes")
def test_same_bits_whoever_does_the_one_large_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """With threads to spare the calling one leaves a block that fills a cache to them, and begins with the rest."""
    monkeypatch.setattr("metafast.division._cores", lambda: 2)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    lanes = metafast._C.vector_bytes() // 4
    batches = [tuple(torch.rand(2, lanes + lanes // 2 + 1, 5, 1)) for _ in range(2)]
    inner = metafast.InnerLoop(net, F.mse_loss, update=metafast.SGD(lr=0.01), steps=24, backend=require("native"))
    found = []
    for threads in (1, 2, 4):
        with test_invariants.torch_threads(threads):
            loss, gradients = inner.meta_gradient(*batches)
        found.append([loss, *gradients.values()])
    assert lanes_of(net) == {1, lanes}
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


# ---- when it is done --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tasks", "cores", "expected"),
    [
        (16, 2, ((8, 16),)),
        (32, 2, ((8, 32),)),
        (31, 2, ((8, 24), (1, 7))),
        (24, 1, ((8, 24),)),
        (24, 2, ((8, 16), (1, 8))),  # a third block would keep one core waiting
        (25, 1, ((8, 24), (1, 1))),
        (25, 2, ((8, 16), (1, 9))),
        (8, 1, ((8, 8),)),
        (8, 2, ((1, 8),)),
        (7, 1, ((1, 7),)),
        (1, 2, ((1, 1),)),
        (0, 2, ((1, 0),)),
        (32, 16, ((1, 32),)),  # more cores than blocks
        (1000, 2, ((8, 1000),)),
    ],
)
def test_division(tasks: int, cores: int, expected: Division) -> None:
    assert _quickest(8, tasks, cores, 0.75) == expected


@pytest.mark.parametrize("tasks", range(70))
@pytest.mark.parametrize("cores", [1, 2, 3, 64])
@pytest.mark.parametrize("lane", [0.16, 0.75, 1.7])
def test_all_tasks_are_done_once_and_every_block_is_full(tasks: int, cores: int, lane: float) -> None:
    division = _quickest(8, tasks, cores, lane)
    assert sum(count for _, count in division) == tasks
    assert all(count % lanes == 0 for lanes, count in division)


def test_few_parameters_lie_side_by_side() -> None:
    lanes = metafast._C.vector_bytes() // 4
    sinusoid = {"0.weight": (40, 1), "0.bias": (40,), "2.weight": (40, 40), "2.bias": (40,), "4.weight": (1, 40)}
    little, much = Work(runs=1, products=10, passes=20, flops=1e4), Work(runs=1, flops=1e8)
    for small in ({"w": (20, 40)}, sinusoid):  # on every instruction set
        assert divided(small, 4, 1000 * lanes, lambda: little) == ((lanes, 1000 * lanes),)
        assert divided(small, 4, 1000 * lanes, lambda: much) == ((1, 1000 * lanes),)
    assert divided({"w": (784, 256)}, 4, 1000 * lanes, lambda: little) == ((1, 1000 * lanes),)


def test_what_a_task_does_is_not_counted_where_nothing_hangs_on_it() -> None:
    lanes = metafast._C.vector_bytes() // 4
    for state, tasks in (({"w": (20, 40)}, lanes - 1), ({"w": (784, 256)}, 1000)):
        assert divided(state, 4, tasks, lambda: pytest.fail("counted")) == ((1, tasks),)


@pytest.mark.shows("lanes")
def test_a_net_that_fits_runs_side_by_side_by_itself() -> None:
    task = entry_named("mlp_relu").make(torch.float32)
    inner = inner_loop(task, "native", steps=2)
    many = tuple(test_invariants._repeat(t, 64) for t in task.support)
    inner(many, many)
    assert lanes_of(task.model) == {metafast._C.vector_bytes() // 4}
