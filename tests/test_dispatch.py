"""Which backend takes a call: what a plan is keyed by, what falls back and how loudly, what the first use checks."""

from __future__ import annotations

import gc
import itertools
import os
import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loops import Reversal
from torch import Tensor, nn

import metafast
from metafast import collector, dispatch

pytest.importorskip("metafast._C")


def tasks(n: int = 3, shots: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 2 * shots, 3, generator=g, dtype=dtype)
    y = torch.randn(n, 2 * shots, 2, generator=g, dtype=dtype)
    return (x[:, :shots], y[:, :shots]), (x[:, shots:], y[:, shots:])


class Net(nn.Module):
    """Plain attributes of several kinds steer the forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.norm, self.b = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)
        self.gain = 1.0
        self.kind = "tanh"
        self.powers = [1]
        self.shift = torch.zeros(2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.a(x)) * self.gain
        h = torch.tanh(h) if self.kind == "tanh" else torch.relu(h)
        for p in self.powers:
            h = h**p
        return self.b(h) + self.shift


def gradients(net: nn.Module, backend: str, loss: Any = F.mse_loss, batch: Any = None) -> dict[str, Tensor]:
    inner = metafast.InnerLoop(net, loss, update=metafast.SGD(lr=0.1), steps=2, backend=backend)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return inner.meta_gradient(*(batch or tasks()))[1]


def agree(net: nn.Module, loss: Any = F.mse_loss, batch: Any = None) -> None:
    ours, theirs = (gradients(net, backend, loss, batch) for backend in ("native", "torch"))
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-12)


def set_gain(net: Net) -> None:
    net.gain = 0.3


def set_kind(net: Net) -> None:
    net.kind = "relu"


def append_power(net: Net) -> None:
    net.powers.append(2)


def replace_shift(net: Net) -> None:
    net.shift = torch.ones(2, dtype=torch.float64)


def fill_shift(net: Net) -> None:
    net.shift.fill_(3.0)


def learn_shift(net: Net) -> None:
    net.shift.requires_grad_()


def to_eval(net: Net) -> None:
    net.eval()


def one_to_eval(net: Net) -> None:
    net.norm.eval()


def freeze_one(net: Net) -> None:
    net.a.weight.requires_grad_(False)


def change_eps(net: Net) -> None:
    net.norm.eps = 0.5


def change_layer(net: Net) -> None:
    net.b = nn.Linear(5, 2, bias=False).double()


def forward_hook(net: Net) -> None:
    net.a.register_forward_hook(lambda module, args, out: out * 2)


CHANGES: list[Callable[[Net], None]] = [
    set_gain,
    set_kind,
    append_power,
    replace_shift,
    fill_shift,
    learn_shift,
    to_eval,
    one_to_eval,
    freeze_one,
    change_eps,
    change_layer,
    forward_hook,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_change_of_the_model_is_seen(change: Callable[[Net], None]) -> None:
    """The same InnerLoop is used before and after, so that a stale plan would be run."""
    net = Net().double()
    inner = metafast.InnerLoop(net, F.mse_loss, update=metafast.SGD(lr=0.1), steps=2, backend="native")
    inner.meta_gradient(*tasks())
    change(net)
    ours = inner.meta_gradient(*tasks())[1]
    theirs = gradients(net, "torch")
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-12)


def test_a_change_of_shapes_dtype_and_closure_is_seen() -> None:
    net, scale = Net().double(), [1.0]

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(out, y) * scale[0]

    agree(net, loss)
    agree(net, loss, tasks(shots=3))
    agree(net, loss, tasks(n=5))
    scale[0] = 2.0
    agree(net, loss)
    net.float()
    net.shift = net.shift.float()
    ours = gradients(net, "native", loss, tasks(dtype=torch.float32))
    assert all(g.dtype == torch.float32 for g in ours.values())


def test_autocast_is_seen() -> None:
    net = Net().double()
    inner = metafast.InnerLoop(net, F.mse_loss, update=metafast.SGD(lr=0.1), steps=1)
    inner.meta_gradient(*tasks())
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.warns(metafast.FallbackWarning):
        inner.meta_gradient(*tasks())


class Odd(nn.Module):
    """An op with no native kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.i0(self.lin(x))


def test_a_fallback_names_op_module_and_line_once() -> None:
    net = nn.Sequential(nn.Identity(), Odd()).double()
    inner = metafast.InnerLoop(net, F.mse_loss, update=metafast.SGD(lr=0.1), steps=1)
    with pytest.warns(metafast.FallbackWarning) as caught:
        inner.meta_gradient(*tasks())
        inner.meta_gradient(*tasks())
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "i0" in text and "1: " in text and "test_dispatch.py" in text and "special.i0(self.lin(x))" in text
    assert caught[0].filename == __file__
    with pytest.raises(metafast.errors.BackendError, match="i0"):
        gradients(net, "native")


@pytest.mark.parametrize("what", ["a counter", "the last features"])
def test_a_model_that_changes_itself_is_soon_planned_no_more_and_warned_of_once(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Restless(nn.Linear):
        seen: Any = 0

        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            self.seen = self.seen + 1 if what == "a counter" else out
            return out

    made = 0
    plan = dispatch._plan

    def counted(problem: Any) -> Any:
        nonlocal made
        made += 1
        return plan(problem)

    monkeypatch.setattr(dispatch, "_plan", counted)
    inner = metafast.InnerLoop(Restless(3, 2).double(), F.mse_loss, update=metafast.SGD(lr=0.1), steps=1)
    expected = r"Restless: test_dispatch.py:\d+ `self.seen = .*`: the forward changes its module: seen"
    with pytest.warns(metafast.FallbackWarning, match=expected) as caught:
        for _ in range(2):
            inner(*tasks()).backward()
        before = made
        for _ in range(3):
            inner(*tasks()).backward()
    assert len(caught) == 1 and made == before


def test_a_layer_that_keeps_its_last_output_is_warned_of_once_and_adds_no_leaf() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.last = self.a(x).relu()
            out: Tensor = self.b(self.last)
            return out

    model = Keeping().double()
    inner = metafast.InnerLoop(model, F.mse_loss, update=metafast.SGD(lr=0.1), steps=1)
    with pytest.warns(metafast.FallbackWarning, match=r"Keeping: test_dispatch.py:\d+ `self.last = .*: last") as caught:
        for _ in range(8):
            inner(*tasks()).backward()
            assert list(inner.meta_gradient(*tasks())[1]) == [name for name, _ in model.named_parameters()]
    assert len(caught) == 1


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_an_operator_on_functions_falls_back(backend: str) -> None:
    def loss(o: Tensor, y: Tensor) -> Tensor:
        (chosen,) = torch.cond(o.sum() > 0, lambda x: (x * 2,), lambda x: (x * 3,), (o,))
        return F.mse_loss(chosen, y)

    def plain(o: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(torch.where(o.sum() > 0, o * 2, o * 3), y)

    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    batch = torch.randn(3, 4, 3), torch.randn(3, 4, 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop = metafast.InnerLoop(model, loss, update=metafast.SGD(0.1), steps=1, order=1, backend=backend)
        got = loop.meta_gradient(batch, batch)
    want = metafast.InnerLoop(model, plain, update=metafast.SGD(0.1), steps=1, order=1).meta_gradient(batch, batch)
    loud = [str(w.message) for w in caught if w.category is metafast.FallbackWarning]
    assert backend == "torch" or "cond in" in loud[0]
    torch.testing.assert_close(got, want)


def test_a_subclass_of_tensor_is_another_plan() -> None:
    class Doubling(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = super().__torch_function__(func, types, args, kwargs or {})
            return result * 2 if func is F.linear else result

    torch.manual_seed(0)
    net, (support, query) = nn.Linear(3, 2).double(), tasks()
    inner = metafast.InnerLoop(net, F.mse_loss, update=metafast.SGD(lr=0.1), steps=1)
    plain = inner.meta_gradient(support, query)[0]
    with pytest.warns(metafast.FallbackWarning, match="a subclass of Tensor"):
        doubled = inner.meta_gradient(support, (query[0].as_subclass(Doubling), query[1]))[0]
    assert not torch.isclose(plain, doubled.as_subclass(Tensor))
    assert torch.equal(inner.meta_gradient(support, query)[0], plain)


def test_channels_last_nets_with_global_pooling_go_native() -> None:
    """`adaptive_avg_pool2d(1)` lays out such results anew, in place: the same elements in the same places."""
    torch.manual_seed(0)
    conv, pool = nn.Conv2d(2, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1)
    net = nn.Sequential(nn.Unflatten(1, (2, 5, 5)), conv, nn.ReLU(), pool, nn.Flatten(), nn.Linear(4, 2)).double()
    net = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x, y = torch.randn(3, 4, 50, dtype=torch.float64), torch.randn(3, 4, 2, dtype=torch.float64)
    agree(net, batch=((x, y), (x, y)))


def test_arguments_that_torch_forgets_under_a_mode_are_kept() -> None:
    """`F.l1_loss` hands a mode all but its weights, and the run that the first use is compared with is under one."""
    weight = torch.rand(4, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    agree(Net().double(), lambda p, y: F.l1_loss(p, y, weight=weight))


@pytest.mark.parametrize("factor", [3.0, float("nan")])
def test_what_capture_cannot_see_fails_the_first_use_check(factor: float) -> None:
    """A hook on an autograd node leaves no mark on tensors or modules; comparing one task's gradient finds it."""

    class Hooked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            with torch._C.DisableTorchFunction():
                if out.grad_fn is not None:
                    out.grad_fn.register_prehook(lambda grads: tuple(g * factor for g in grads))
            return out

    net = Hooked(3, 2).double()
    inner = metafast.InnerLoop(net, F.mse_loss, update=metafast.SGD(lr=0.1), steps=0)
    with pytest.warns(metafast.FallbackWarning, match="lost something: the gradient of the first task"):
        ours = inner.meta_gradient(*tasks())[1]
    theirs = metafast.InnerLoop(net, F.mse_loss, update=metafast.SGD(lr=0.1), steps=0, backend="torch")
    for name, g in theirs.meta_gradient(*tasks())[1].items():
        torch.testing.assert_close(ours[name], g, equal_nan=True)


def test_an_update_that_comes_out_otherwise_fails_the_first_use_check(monkeypatch: pytest.MonkeyPatch) -> None:
    from metafast import native

    traces_of = native._rule_traces

    def other(*args: Any) -> Any:
        init, update = traces_of(*args)
        update.values = {key: 2 * t if key.startswith("made/") else t for key, t in update.values.items()}
        return init, update

    monkeypatch.setattr(native, "_rule_traces", other)
    with pytest.warns(metafast.FallbackWarning, match="update of the update rule differs from PyTorch's by 0.5"):
        metafast.InnerLoop(nn.Linear(3, 2).double(), F.mse_loss, update=metafast.SGD(lr=0.1), steps=1)(*tasks())


NUMPY, COUNTER = np.random.default_rng(0), itertools.count()
UNSEEN_UNTIL_AFTERWARDS: dict[str, tuple[Callable[[], float], str]] = {
    "random": (lambda: random.random(), r"random in Drawing: test_dispatch\.py:\d+ `.*random\.random\(\), r.*: draws"),
    "uniform": (lambda: random.uniform(0, 1), r"random in Drawing: test_dispatch\.py:\d+ `.*random\.uniform\("),
    "numpy": (lambda: float(np.random.rand()), r"numpy\.random in Drawing: test_dispatch\.py:\d+ `.*np\.random\.rand"),
    "generator": (lambda: NUMPY.random(), r"numpy\.random\.Generator in Drawing: test_dispatch\.py:\d+ `.*NUMPY\."),
    "counter": (lambda: float(next(COUNTER)), r"in Drawing: test_dispatch\.py:\d+ `.*next\(COUNTER\)"),
}


@pytest.mark.parametrize("name", UNSEEN_UNTIL_AFTERWARDS)
def test_what_shows_only_after_the_run_is_traced_to_the_users_line(name: str) -> None:
    draw, words = UNSEEN_UNTIL_AFTERWARDS[name]

    class Drawing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            out = super().forward(x)
            return out * draw()

    inner = metafast.InnerLoop(Drawing(3, 2).double(), F.mse_loss, update=metafast.SGD(lr=0.1), steps=1)
    with pytest.warns(metafast.FallbackWarning, match=words):
        inner.meta_gradient(*tasks())


def test_a_recurrent_net_falls_back_at_the_line_that_calls_it() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.LSTM(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            out, _ = self.cells(x)
            return out

    inner = metafast.InnerLoop(Recurrent().double(), F.mse_loss, update=metafast.SGD(lr=0.1), steps=1)
    words = r"attribute in Recurrent: test_dispatch\.py:\d+ `out, _ = self\.cells\(x\)`: .*cells\._flat_weight.* LSTM"
    with pytest.warns(metafast.FallbackWarning, match=words):
        inner.meta_gradient(*tasks())


def test_where_no_line_of_the_model_is_the_users_the_call_is_shown() -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.Dropout()).double()
    words = r"bernoulli.* in 1: draws random numbers \(called from test_dispatch\.py:\d+ `metafast\.InnerLoop\(net"
    with pytest.warns(metafast.FallbackWarning, match=words):
        metafast.InnerLoop(net, F.mse_loss, update=metafast.SGD(lr=0.1), steps=1)(*tasks())


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        return ct


@pytest.mark.parametrize("function", [StraightThrough, Reversal])
def test_custom_gradients_fall_back_and_are_right(function: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(function.apply(self.a(x)))

    torch.manual_seed(0)
    net = Net().double()
    inner = metafast.InnerLoop(net, F.mse_loss, update=metafast.SGD(lr=0.1), steps=0)
    support, query = tasks()
    with pytest.warns(metafast.FallbackWarning, match=function.__name__):
        ours = inner.meta_gradient(support, query)[1]
    total = sum(F.mse_loss(net(x), y) for x, y in zip(*query, strict=True)) / 3
    wanted = torch.autograd.grad(total, list(net.parameters()))
    for got, want in zip(ours.values(), wanted, strict=True):
        torch.testing.assert_close(got, want)


def test_a_support_loss_that_no_step_runs_may_raise() -> None:
    """One example a task: BatchNorm refuses it, and the query alone is asked for."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    (x, y), query = tasks()
    inner = metafast.InnerLoop(net, F.mse_loss, update=metafast.SGD(lr=0.1), steps=0)
    with pytest.warns(metafast.FallbackWarning, match="no step runs its loss, which raises ValueError"):
        ours = inner((x[:, :1], y[:, :1]), query)
    inner.backend = "torch"
    torch.testing.assert_close(ours, inner((x[:, :1], y[:, :1]), query))
    inner.backend, inner.steps = "auto", 1
    with pytest.raises(metafast.MetafastError, match="task 0, inner step 0: ValueError"):
        inner((x[:, :1], y[:, :1]), query)


def test_a_buffer_that_requires_grad_falls_back_and_gets_its_gradient() -> None:
    net = nn.Linear(3, 2).double()
    net.register_buffer("scale", torch.ones(2, dtype=torch.float64, requires_grad=True))
    batches = tasks()

    def gradient(backend: str) -> Tensor:
        objective = lambda model, batch: F.mse_loss(model(batch[0]) * model.scale, batch[1])  # noqa: E731
        inner = metafast.InnerLoop(net, objective=objective, update=metafast.SGD(lr=0.1), steps=1, backend=backend)
        return inner.meta_gradient(*batches)[1]["extern/0"]

    with pytest.warns(metafast.FallbackWarning, match="a buffer that requires grad"):
        ours = gradient("auto")
    assert ours.abs().min() > 0
    torch.testing.assert_close(ours, gradient("torch"))


def test_each_loss_runs_once_for_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run that finds tensors in closures is the run that the plan is made of."""
    from metafast import capture, externs

    runs = []
    run_model = capture._run_model
    monkeypatch.setattr(capture, "_run_model", lambda *args: runs.append(args[-1]) or run_model(*args))
    monkeypatch.setattr(externs, "Reference", None)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    gradients(nn.Linear(3, 2).double(), "native", lambda out, y: F.mse_loss(out * scale, y))
    assert runs == [["support/0", "support/1"], ["query/0", "query/1"]]


def test_a_support_half_is_captured_and_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another query shape captures and checks the query alone; another support shape, or another net, both."""
    from metafast import native

    met: list[tuple[str, str]] = []

    def note(name: str, at: int) -> None:
        function = getattr(native, name)
        monkeypatch.setattr(native, name, lambda *args: met.append((name, args[at])) or function(*args))

    note("_trace", 1)
    note("_first_run", 2)
    query_alone = {("_trace", "query"), ("_first_run", "query")}
    both = query_alone | {("_trace", "support"), ("_first_run", "support")}
    net, (support, query) = Net().double(), tasks()
    inner = metafast.InnerLoop(net, F.mse_loss, update=metafast.SGD(lr=0.1), steps=2, backend="native")
    rows = lambda batch, n: tuple(t[:, :n] for t in batch)  # noqa: E731
    for batch, expected in [
        ((support, query), both),
        ((support, rows(query, 3)), query_alone),
        ((rows(support, 3), query), both),
        ((rows(support, 3), rows(query, 3)), query_alone),
    ]:
        met.clear()
        inner.meta_gradient(*batch)
        assert sorted(met) == sorted(expected)
        agree(net, batch=batch)
    set_kind(net)
    met.clear()
    inner.meta_gradient(support, rows(query, 2))
    assert sorted(met) == sorted(both)


def test_what_was_captured_of_the_support_half_holds_its_tensors_alone() -> None:
    """A tensor of a closure that another takes the place of is captured anew; and differentiated."""
    kept = {"scale": torch.full((), 2.0, dtype=torch.float64, requires_grad=True)}
    loss = lambda out, y: F.mse_loss(out * kept["scale"], y)  # noqa: E731
    net, (support, query) = nn.Linear(3, 2).double(), tasks()
    options = {"update": metafast.SGD(lr=0.1), "steps": 2}
    loops = [metafast.InnerLoop(net, loss, backend=b, **options) for b in ("native", "torch")]
    for n in (4, 3, 2, 1):
        ours, theirs = (inner.meta_gradient(support, tuple(t[:, :n] for t in query)) for inner in loops)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        kept["scale"] = torch.full((), 1.0 + n, dtype=torch.float64, requires_grad=True)


def test_who_wants_a_gradient_is_part_of_what_was_captured() -> None:
    net, (support, query) = Net().double(), tasks()
    options = {"update": metafast.SGD(lr=0.1), "steps": 2}
    loops = [metafast.InnerLoop(net, F.mse_loss, backend=b, **options) for b in ("native", "torch")]
    for n, wants in ((4, True), (3, False), (2, True)):
        net.a.bias.requires_grad_(wants)
        ours, theirs = (inner.meta_gradient(support, tuple(t[:, :n] for t in query)) for inner in loops)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_plans_are_capped() -> None:
    net = Net().double()
    inner = metafast.InnerLoop(net, F.mse_loss, update=metafast.SGD(lr=0.1), steps=0, backend="native")
    support, query = tasks()
    for k in range(dispatch.MOST_PLANS + 3):
        net.gain = float(k)
        if k % 16 == 0 or k > dispatch.MOST_PLANS:
            inner.meta_gradient(support, query)
        else:
            dispatch._plans.setdefault(net, {})[k] = next(iter(dispatch._plans[net].values()))
    assert len(dispatch._plans[net]) <= dispatch.MOST_PLANS + 1


def test_explain_shows_backend_reason_graph_program_flops_and_memory() -> None:
    inner = metafast.InnerLoop(Net().double(), F.mse_loss, update=metafast.SGD(lr=0.1), steps=2)
    text = str(inner.explain(*tasks()))
    for part in ("backend: native", "why: ", "standardize", "section meta", "gemm", "flops", "memory"):
        assert part in text, part


def test_a_gradient_that_is_zero_but_for_rounding_goes_native() -> None:
    """The mean over all pixels of an instance norm is constant: its float32 gradient is noise in PyTorch too."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.Flatten(1))

    def objective(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]).sum(1, keepdim=True), batch[1])

    batch = torch.randn(2, 3, 4, 6, 6), torch.randn(2, 3, 1)
    update = metafast.SGD(lr=0.1)
    inner = metafast.InnerLoop(net, objective=objective, update=update, steps=1, backend="native")
    assert torch.isfinite(inner.meta_gradient(batch, batch)[0])


def test_a_defect_in_planning_falls_back_loudly(monkeypatch: pytest.MonkeyPatch) -> None:
    from metafast import native

    def broken(*_: Any) -> None:
        raise KeyError("register")

    monkeypatch.setattr(native, "lower", broken)
    net = nn.Linear(3, 2).double()
    inner = metafast.InnerLoop(net, F.mse_loss, update=metafast.SGD(lr=0.1), steps=1)
    with pytest.warns(metafast.FallbackWarning, match="KeyError.*please report"):
        loss, _ = inner.meta_gradient(*tasks())
    again = metafast.InnerLoop(net, F.mse_loss, update=metafast.SGD(lr=0.1), steps=1, backend="torch")
    torch.testing.assert_close(loss, again.meta_gradient(*tasks())[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_a_child_forked_while_a_thread_plans_collects_garbage() -> None:
    started, done = threading.Event(), threading.Event()

    def plan() -> None:
        with collector.waiting():
            started.set()
            done.wait(10)

    planner = threading.Thread(target=plan)
    planner.start()
    started.wait(10)
    assert not gc.isenabled()
    child = os.fork()
    if not child:
        os._exit(0 if gc.isenabled() else 1)
    done.set()
    planner.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert gc.isenabled()


def test_order_of_modules_is_part_of_a_plan() -> None:
    """A Sequential runs its children in the order of their dict, and so may any forward."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.d = nn.ModuleDict({name: nn.Linear(3, 3) for name in "abc"})

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.d.values():
                x = layer(x).tanh()
            return x[..., :2]

    net, (support, query) = Chain().double(), tasks()
    options = {"update": metafast.SGD(lr=0.1), "steps": 2}
    loops = [metafast.InnerLoop(net, F.mse_loss, backend=b, **options) for b in ("native", "torch")]
    for n, name in ((4, "a"), (4, "c"), (3, "b"), (3, "a")):
        ours, theirs = (inner.meta_gradient(support, tuple(t[:, :n] for t in query)) for inner in loops)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        net.d[name] = net.d.pop(name)


def test_order_of_buffers_is_part_of_a_plan() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("scale", torch.full((), 2.0))
            self.register_buffer("shift", torch.full((), 0.5))

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.buffers()
            return self.linear(x) * first + second

    net = Shifted().double()
    options = {"update": metafast.SGD(lr=0.1), "steps": 2}
    loops = [metafast.InnerLoop(net, F.mse_loss, backend=b, **options) for b in ("native", "torch")]
    for _ in range(2):
        ours, theirs = (inner.meta_gradient(*tasks()) for inner in loops)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        net._buffers["scale"] = net._buffers.pop("scale")


@pytest.mark.parametrize("returns", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_tensors_of_closures_keep_apart_where_queries_read_others(returns: bool, frozen: bool) -> None:
    """Without a step the query alone says how they are numbered, while the support loss is not captured again."""
    scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([0.3, 0.4], dtype=torch.float64, requires_grad=True)

    def query_loss(out: Tensor, y: Tensor) -> Tensor:
        first = (out * weights).sum()
        return first if len(out) % 2 else F.mse_loss(out, y) * scale + first

    net, (support, query) = nn.Linear(3, 2).double(), tasks()
    net.weight.requires_grad_(not frozen)
    options = {"update": metafast.SGD(lr=0.1), "steps": 0, "query_loss": query_loss, "return_outputs": returns}
    loss = lambda out, y: F.mse_loss(out, y) * scale  # noqa: E731
    loops = [metafast.InnerLoop(net, loss, backend=b, **options) for b in ("native", "torch")]
    for n in (4, 3, 2, 1):
        ours, theirs = (inner.meta_gradient(support, tuple(t[:, :n] for t in query)) for inner in loops)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_parameter_that_is_a_buffer_as_well_falls_back(frozen: bool) -> None:
    net = nn.Linear(3, 2).double()
    net.register_buffer("alias", net.weight)
    net.weight.requires_grad_(not frozen)
    inner = metafast.InnerLoop(net, F.mse_loss, update=metafast.SGD(lr=0.1), steps=1)
    with pytest.warns(metafast.FallbackWarning, match="alias"):
        got = inner.meta_gradient(*tasks())
    reference = metafast.InnerLoop(net, F.mse_loss, update=metafast.SGD(lr=0.1), steps=1, backend="torch")
    torch.testing.assert_close(got, reference.meta_gradient(*tasks()))


def test_empty_tensors_of_any_strides_are_read() -> None:
    net, (support, query) = nn.Linear(3, 2).double(), tasks()

    def objective(model: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1]) + batch[2].square().sum()

    options = {"update": metafast.SGD(lr=0.1), "steps": 1}
    loops = [metafast.InnerLoop(net, objective=objective, backend=b, **options) for b in ("native", "torch")]
    for odd in (torch.randn(3, 0, 4).double(), torch.randn(3, 6, 8).double()[:, :0, ::2]):
        given = (*support, torch.randn(3, 0, 4).double()), (*query, odd)
        ours, theirs = (inner.meta_gradient(*given) for inner in loops)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


WITHOUT_THE_MODULE = """
import sys
sys.modules["metafast._C"] = None
import torch, metafast, torch.nn.functional as F
torch.manual_seed(0)
model = torch.nn.Linear(3, 2).double()
x, y = torch.randn(2, 4, 3).double(), torch.randn(2, 4, 2).double()
inner = metafast.InnerLoop(model, F.mse_loss, update=metafast.SGD(lr=0.1), steps=1)

def wanted():
    losses = []
    for t in range(2):
        w = model.weight, model.bias
        grads = torch.autograd.grad(F.mse_loss(F.linear(x[t], *w), y[t]), w, create_graph=True)
        losses.append(F.mse_loss(F.linear(x[t], *(a - 0.1 * g for a, g in zip(w, grads))), y[t]))
    return torch.autograd.grad(sum(losses) / 2, w)

for value in range(3):
    got = inner.meta_gradient((x, y), (x, y))[1]
    torch.testing.assert_close([got["weight"], got["bias"]], list(wanted()))
    model.bias = torch.nn.Parameter(torch.full((2,), float(value)).double())
"""


def test_without_the_compiled_module_the_reference_answers() -> None:
    """Every call finds the names of the model anew."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_THE_MODULE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the compiled module cannot be imported") >= 1
