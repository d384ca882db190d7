"""What the losses read besides their arguments: each change of it is seen by the next call, and only such a change."""

from __future__ import annotations

import array
import collections
import contextvars
import dataclasses
import enum
import functools
import importlib
import itertools
import operator
import os
import random
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metafast
from metafast import dispatch
from metafast.reach import Reach

pytest.importorskip("metafast._C")

F64 = torch.float64


@dataclasses.dataclass
class Settings:
    gain: float = 1.0


class Slotted:
    __slots__ = ("gain",)

    def __init__(self) -> None:
        self.gain = 1.0


class ClassGain:
    gain = 1.0


GAIN = 1.0
TABLE: dict[str, Any] = {"deep": {"gain": 1.0}}
SPACE = types.SimpleNamespace(gain=1.0, act=torch.tanh, tensor=torch.ones((), dtype=F64))
SETTINGS, SLOTTED = Settings(), Slotted()
ARRAY = np.ones(1)
FLAGS = {"on"}


def helper(h: Tensor) -> Tensor:
    return h * GAIN


class Net(nn.Module):
    """A forward that reads one thing of each kind."""

    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.a, self.act, self.b = nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)
        self.box, self.settings = types.SimpleNamespace(gain=1.0), Settings()
        self.array, self.flags = np.ones(1), {"on"}

    def forward(self, x: Tensor) -> Tensor:
        h = helper(self.act(self.a(x))) * self.factor * self.box.gain * self.settings.gain * float(self.array[0])
        h = h * TABLE["deep"]["gain"] * SPACE.gain * SETTINGS.gain * float(ARRAY[0]) * SPACE.tensor
        h = SPACE.act(h) if "on" in FLAGS else h
        return self.b(h * SLOTTED.gain * ClassGain.gain if "on" in self.flags else h * 0.5)


def tasks() -> tuple[Any, Any]:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(3, 8, 3, generator=g, dtype=F64), torch.randn(3, 8, 2, generator=g, dtype=F64)
    return (x[:, :4], y[:, :4]), (x[:, 4:], y[:, 4:])


def change(name: str, net: Net, patch: pytest.MonkeyPatch) -> None:
    """Change one thing; what does not belong to `net` is given back after the test."""
    here = globals()
    if name == "child":
        net.act = nn.Tanh()  # type: ignore[assignment]
    elif name == "class of the model":
        net.__class__ = type("Other", (Net,), {"forward": lambda self, x: self.b(torch.sigmoid(self.a(x)))})
    elif name == "object of the model":
        net.box.gain = 2.0
    elif name == "dataclass of the model":
        net.settings.gain = 2.0
    elif name == "array of the model":
        net.array[0] = 2.0
    elif name == "set of the model":
        net.flags.clear()
    elif name == "array":
        patch.setitem(here, "ARRAY", np.full(1, 2.0))
    elif name == "default dtype":
        patch.setattr(torch, "pi", 3.0)  # named nowhere: no change
        torch.set_default_dtype(F64)
    else:
        owner, key, value = OUTSIDE[name]
        (patch.setitem if isinstance(owner, dict) else patch.setattr)(owner, key, value)  # type: ignore[operator]


OUTSIDE: dict[str, tuple[Any, str, Any]] = {
    "forward of a class": (Net, "forward", lambda self, x: self.b(torch.sigmoid(self.a(x)))),
    "forward of torch's": (nn.ReLU, "forward", lambda self, x: torch.tanh(x)),
    "class attribute": (Net, "factor", 2.0),
    "attribute of another class": (ClassGain, "gain", 2.0),
    "global behind a function": (globals(), "GAIN", 2.0),
    "global function": (globals(), "helper", lambda h: torch.sin(h)),
    "nested dict": (TABLE["deep"], "gain", 2.0),
    "namespace": (SPACE, "gain", 2.0),
    "function in a namespace": (SPACE, "act", torch.sin),
    "tensor in a namespace": (SPACE, "tensor", torch.full((), 2.0, dtype=F64)),
    "dataclass": (SETTINGS, "gain", 2.0),
    "slots": (SLOTTED, "gain", 2.0),
    "set": (globals(), "FLAGS", set()),
}
INSIDE = ["child", "class of the model", "object of the model", "dataclass of the model", "array of the model"]


def agree(inner: metafast.InnerLoop) -> None:
    """The native gradient, from a plan old or new, against that of the reference, which has none."""
    answers = []
    for backend in ("native", "torch"):
        inner.backend = backend
        answers.append(inner.meta_gradient(*tasks())[1])
    for name, gradient in answers[1].items():
        torch.testing.assert_close(answers[0][name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [*INSIDE, "set of the model", "array", *OUTSIDE])
def test_a_change_of_what_the_forward_reads_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net().double()
    inner = metafast.InnerLoop(net, F.mse_loss, update=metafast.SGD(lr=0.1), steps=2)
    agree(inner)
    before = inner.meta_gradient(*tasks())[1]
    change(name, net, monkeypatch)
    agree(inner)
    after = inner.meta_gradient(*tasks())[1]
    assert any(not torch.allclose(before[n], after[n]) for n in before), "the change changes nothing"


@pytest.fixture
def default_dtype() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


def test_the_default_dtype_is_seen(default_dtype: None) -> None:
    net = nn.Linear(3, 2).double()
    inner = metafast.InnerLoop(
        net, lambda out, y: F.mse_loss(out * torch.tensor(0.1), y), update=metafast.SGD(lr=0.1), steps=2
    )
    agree(inner)
    torch.set_default_dtype(F64)
    agree(inner)


def keyword_default() -> tuple[Any, Callable[[], None]]:
    def loss(out: Tensor, y: Tensor, *, gain: float = 1.0) -> Tensor:
        return F.mse_loss(out, y) * gain

    return loss, lambda: loss.__kwdefaults__.__setitem__("gain", 2.0)  # type: ignore[attr-defined]


def other_module() -> tuple[Any, Callable[[], None]]:
    after = nn.BatchNorm1d(2).double().eval()

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(after(out), y)

    return loss, lambda: setattr(after, "eps", 0.5)


class Criterion:
    gain = 1.0

    def __call__(self, out: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(out, y) * self.gain


def attribute_of_a_callables_class() -> tuple[Any, Callable[[], None]]:
    own = type("Own", (Criterion,), {})
    return own(), lambda: setattr(own, "gain", 2.0)


def closure_in_a_closure() -> tuple[Any, Callable[[], None]]:
    space = types.SimpleNamespace(f=lambda loss: loss)

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return space.f(F.mse_loss(out, y))

    return loss, lambda: setattr(space, "f", lambda loss: loss * 2)


def order_of_a_dict() -> tuple[Any, Callable[[], None]]:
    gains = {"a": lambda loss: loss + 1, "b": lambda loss: loss * 3}

    def loss(out: Tensor, y: Tensor) -> Tensor:
        value = F.mse_loss(out, y)
        for gain in gains.values():
            value = gain(value)
        return value

    return loss, lambda: gains.__setitem__("a", gains.pop("a"))


def a_gain(read: Callable[[], Any], alter: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    return (lambda out, y: F.mse_loss(out, y) * read()), alter


class Meta(type):
    @property
    def gain(cls) -> float:
        return cls.inner_gain  # type: ignore[attr-defined,no-any-return]


def attribute_of_a_function() -> tuple[Any, Callable[[], None]]:
    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(out, y) * loss.gain  # type: ignore[attr-defined,no-any-return]

    loss.gain = 1.0  # type: ignore[attr-defined]
    return loss, lambda: setattr(loss, "gain", 2.0)


def attribute_of_a_tensor() -> tuple[Any, Callable[[], None]]:
    one = torch.ones((), dtype=F64)
    one.gain = 1.0  # type: ignore[attr-defined]
    return a_gain(lambda: one * one.gain, lambda: setattr(one, "gain", 2.0))  # type: ignore[attr-defined]


def gradient_of_a_tensor() -> tuple[Any, Callable[[], None]]:
    one = torch.ones((), dtype=F64, requires_grad=True)
    one.grad = torch.ones((), dtype=F64)
    return a_gain(lambda: one.grad, lambda: setattr(one, "grad", torch.full((), 2.0, dtype=F64)))


def property_of_a_metaclass() -> tuple[Any, Callable[[], None]]:
    own = Meta("own", (), {"inner_gain": 1.0})
    return a_gain(lambda: own.gain, lambda: setattr(own, "inner_gain", 2.0))  # type: ignore[attr-defined]


def getattr_that_raises() -> tuple[Any, Callable[[], None]]:
    store = {"gain": 1.0}
    own = type("Own", (), {"__getattr__": lambda self, name: store[name]})()
    return a_gain(lambda: own.gain, lambda: store.__setitem__("gain", 2.0))


def weak_reference() -> tuple[Any, Callable[[], None]]:
    space = Settings()
    ref = weakref.ref(space)

    def alter() -> None:
        space.gain = 2.0

    return a_gain(lambda: ref().gain, alter)  # type: ignore[union-attr]


def attribute_getter() -> tuple[Any, Callable[[], None]]:
    space, get = types.SimpleNamespace(deep=types.SimpleNamespace(gain=1.0)), operator.attrgetter("deep.gain")
    return a_gain(lambda: get(space), lambda: setattr(space.deep, "gain", 2.0))


def context_variable() -> tuple[Any, Callable[[], None]]:
    var = contextvars.ContextVar("var", default=1.0)
    return a_gain(var.get, lambda: var.set(2.0))


def cached_function() -> tuple[Any, Callable[[], None]]:
    gain = [1.0]
    read = functools.lru_cache(lambda: gain[0])
    return a_gain(read, lambda: (gain.__setitem__(0, 2.0), read.cache_clear()))


def mapping(kind: Callable[[dict[str, float]], Any]) -> tuple[Any, Callable[[], None]]:
    gains = {"gain": 1.0}
    view = kind(gains)
    return a_gain(lambda: view["gain"], lambda: gains.__setitem__("gain", 2.0))


def raw_numbers(made: Any) -> tuple[Any, Callable[[], None]]:
    return a_gain(lambda: float(made[0]), lambda: made.__setitem__(0, 2))


def method_of_a_class() -> tuple[Any, Callable[[], None]]:
    own = type("Own", (), {"read": functools.partialmethod(lambda self, gain: gain, 1.0)})
    other = functools.partialmethod(lambda self, gain: gain, 2.0)
    return a_gain(lambda: own().read(), lambda: setattr(own, "read", other))  # type: ignore[attr-defined]


def imported_by_the_loss() -> tuple[Any, Callable[[], None]]:
    made = types.ModuleType("settings_of_a_test")
    made.gain = 1.0  # type: ignore[attr-defined]
    sys.modules[made.__name__] = made

    def loss(out: Tensor, y: Tensor) -> Tensor:
        import settings_of_a_test

        return F.mse_loss(out, y) * settings_of_a_test.gain

    return loss, lambda: setattr(made, "gain", 2.0)


def imported_by_name() -> tuple[Any, Callable[[], None]]:
    made = types.ModuleType("other_settings_of_a_test")
    made.gain = 1.0  # type: ignore[attr-defined]
    sys.modules[made.__name__] = made
    read = lambda: importlib.import_module("other_settings_of_a_test").gain  # noqa: E731
    return a_gain(read, lambda: setattr(made, "gain", 2.0))


def environment() -> tuple[Any, Callable[[], None]]:
    os.environ["GAIN_OF_A_TEST"] = "1"
    return a_gain(lambda: float(os.getenv("GAIN_OF_A_TEST", "0")), lambda: os.environ.update(GAIN_OF_A_TEST="2"))


def cleared_cache() -> tuple[Any, Callable[[], None]]:
    gain = [2.0]
    read = functools.lru_cache(lambda: gain[0])
    read()
    gain[0] = 3.0
    return a_gain(read, read.cache_clear)


class Act(enum.Enum):
    TANH = "tanh"

    def gain(self) -> float:
        return GAIN


class Rate(float):
    def gain(self) -> float:
        return GAIN


class Pair(NamedTuple):
    first: float

    def gain(self) -> float:
        return self.first * GAIN


class Table(dict):  # type: ignore[type-arg]
    def gain(self) -> float:
        return sum(self.values()) * GAIN


def of_a_class(held: Any) -> tuple[Any, Callable[[], None]]:
    return a_gain(lambda: held.gain(), lambda: globals().__setitem__("GAIN", 2.0))


def attribute_of_a_tuple() -> tuple[Any, Callable[[], None]]:
    held = type("Own", (tuple,), {"gain": 1.0})()
    return a_gain(lambda: held.gain, lambda: setattr(held, "gain", 2.0))


def attribute_of_a_number_that_holds_itself() -> tuple[Any, Callable[[], None]]:
    held = type("Own", (int,), {})(1)
    held.gain, held.data = 1.0, held
    return a_gain(lambda: held.data.gain, lambda: setattr(held, "gain", 2.0))


_FUNCTIONS = (keyword_default, other_module, attribute_of_a_callables_class, closure_in_a_closure, order_of_a_dict)
_FUNCTIONS += (attribute_of_a_function, attribute_of_a_tensor, gradient_of_a_tensor, property_of_a_metaclass)
_FUNCTIONS += (method_of_a_class, imported_by_the_loss, imported_by_name, environment, cleared_cache)
_FUNCTIONS += (getattr_that_raises, weak_reference, attribute_getter, context_variable, cached_function)
_FUNCTIONS += (attribute_of_a_tuple, attribute_of_a_number_that_holds_itself)
_SEEN: dict[str, Any] = {f.__name__: f for f in _FUNCTIONS} | {
    "proxy": lambda: mapping(types.MappingProxyType),
    "chain": lambda: mapping(lambda d: collections.ChainMap({}, d)),  # type: ignore[arg-type]
    "bytes": lambda: raw_numbers(bytearray([1])),
    "user list": lambda: raw_numbers(collections.UserList([1.0])),
    "long list": lambda: raw_numbers([1.0] * 5000),
    "long dict": lambda: raw_numbers(dict.fromkeys(range(5000), 1.0)),
    "long array": lambda: raw_numbers(np.ones(50000)),
    "array": lambda: raw_numbers(array.array("d", [1.0])),
    "method of an enumeration": lambda: of_a_class(Act.TANH),
    "method of a number": lambda: of_a_class(Rate(1.0)),
    "method of a named tuple": lambda: of_a_class(Pair(1.0)),
    "method of a dict": lambda: of_a_class(Table(a=1.0)),
}


@pytest.mark.parametrize("make", _SEEN.values(), ids=_SEEN)
def test_a_change_of_what_the_loss_reads_is_seen(
    make: Callable[[], tuple[Any, Callable[[], None]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "GAIN", 1.0)
    loss, alter = make()
    inner = metafast.InnerLoop(nn.Linear(3, 2).double(), loss, update=metafast.SGD(lr=0.1), steps=2)
    agree(inner)
    alter()
    agree(inner)


def test_hooks_on_all_modules_and_what_a_hook_reads_are_seen() -> None:
    net, gain = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).double(), [1.0]
    net[1].register_forward_hook(lambda module, args, out: out * gain[0])
    inner = metafast.InnerLoop(net, F.mse_loss, update=metafast.SGD(lr=0.1), steps=2)
    agree(inner)
    gain[0] = 2.0
    agree(inner)
    everywhere = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: out * 2 if isinstance(module, nn.ReLU) else None
    )
    try:
        agree(inner)
    finally:
        everywhere.remove()
    agree(inner)


class Decay(metafast.UpdateRule):
    """What it reads is in a global, the class, and an object of its own."""

    beta = 0.0

    def __init__(self, lr: Any) -> None:
        super().__init__(lr=lr)
        self.more = types.SimpleNamespace(wd=0.0)

    def update(self, params: Any, grads: Any, state: Any, hyper: Any, k: Any, params0: Any) -> Any:
        decay = SPACE.decay + self.beta + self.more.wd
        return {n: p - self.lr * (grads[n] + decay * p) for n, p in params.items()}, state


def rate(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


@pytest.mark.parametrize("what", ["global", "class", "object", "method", "rate"])
@pytest.mark.parametrize("kind", [float, rate, lambda v: nn.Parameter(rate(v))], ids=["number", "tensor", "learned"])
def test_a_change_of_what_a_rule_reads_is_seen(what: str, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SPACE, "decay", 0.0, raising=False)
    rule = Decay(kind(0.1))
    inner = metafast.InnerLoop(nn.Linear(3, 2).double(), F.mse_loss, update=rule, steps=2)
    agree(inner)
    if what == "global":
        monkeypatch.setattr(SPACE, "decay", 1.0)
    elif what == "class":
        monkeypatch.setattr(Decay, "beta", 1.0)
    elif what == "object":
        rule.more.wd = 1.0
    elif what == "method":
        monkeypatch.setattr(Decay, "update", lambda self, p, g, s, h, k, p0: ({n: p[n] - g[n] for n in p}, s))
    else:
        rule.lr = kind(1.0)
    agree(inner)


def test_a_loss_that_knows_its_loop() -> None:
    def objective(model: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1]) * inner.update.lr / inner.steps  # type: ignore[operator]

    model = nn.Linear(3, 2).double()
    inner = metafast.InnerLoop(model, objective=objective, update=metafast.SGD(lr=0.1), steps=2)
    agree(inner)
    inner.steps = 3
    agree(inner)
    inner.update.lr = 0.5  # type: ignore[assignment]
    agree(inner)


def test_an_attribute_is_no_global_of_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A script calls its loss as the model's code calls a method."""
    model = nn.Linear(3, 2).double()
    inner = metafast.InnerLoop(
        model, lambda out, y: (out - y).square().mean(), update=metafast.SGD(lr=0.1), steps=1, reduction="none"
    )
    for step in range(3):
        losses = inner(*tasks())
        monkeypatch.setitem(globals(), "mean", losses.mean())
        losses.mean().backward()
        monkeypatch.setitem(globals(), "square", step)
    assert len(dispatch._plans[model]) == 1


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: iter([1.0, 2.0, 3.0] * 9), "list_iterator"),
        (lambda: itertools.cycle([1.0, 2.0, 3.0]), "cycle"),
        (lambda: [1.0] * 70_000, "70000 entries"),
    ],
)
def test_what_takes_too_long_to_look_through_falls_back(make: Callable[[], Any], what: str) -> None:
    held = make()

    def loss(out: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(out, y) * (held[0] if isinstance(held, list) else next(held))

    inner = metafast.InnerLoop(nn.Linear(3, 2).double(), loss, update=metafast.SGD(lr=0.1), steps=1)
    with pytest.warns(metafast.FallbackWarning, match=what):
        inner(*tasks())


class UserList(collections.UserList):  # type: ignore[type-arg]
    gain = 1.0


def attribute_of_a_list() -> tuple[Any, Callable[[], None]]:
    held = UserList([0.0])
    return a_gain(lambda: held.gain, lambda: setattr(held, "gain", 2.0))


def by_the_functions_globals() -> tuple[Any, Callable[[], None]]:
    return a_gain(lambda: helper.__globals__["GAIN"], lambda: None)


def by_the_modules_name() -> tuple[Any, Callable[[], None]]:
    return a_gain(lambda: importlib.import_module(__name__).GAIN, lambda: None)


@pytest.mark.parametrize("make", [by_the_functions_globals, by_the_modules_name])
def test_globals_that_are_read_on_other_ways(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = metafast.InnerLoop(nn.Linear(3, 2).double(), make()[0], update=metafast.SGD(lr=0.1), steps=1)
    agree(inner)
    monkeypatch.setitem(globals(), "GAIN", 3.0)
    agree(inner)


def test_an_attribute_of_a_users_list() -> None:
    loss, alter = attribute_of_a_list()
    inner = metafast.InnerLoop(nn.Linear(3, 2).double(), loss, update=metafast.SGD(lr=0.1), steps=1)
    agree(inner)
    alter()
    agree(inner)


UNREAD: dict[str, Any] = {
    "long list": lambda: [1.0] * 70_000,
    "list": lambda: list(range(1000)),
    "names": lambda: np.array(["a", "b"], dtype=object),
    "array": lambda: np.zeros(10_000),
    "iterator": lambda: iter([1.0, 2.0]),
    "cycle": lambda: itertools.cycle([1.0]),
    "generator": torch.Generator,
}


@pytest.mark.parametrize("make", UNREAD.values(), ids=UNREAD)
def test_data_on_the_model_that_no_code_names_costs_no_plan(make: Any) -> None:
    model = nn.Linear(3, 2).double()
    model.some_notes = held = make()
    inner = metafast.InnerLoop(model, F.mse_loss, update=metafast.SGD(lr=0.1), steps=1, backend="native")
    for step in range(3):
        inner(*tasks())
        if isinstance(held, list) or (isinstance(held, np.ndarray) and held.dtype != object):
            held[5] = step
    assert len(dispatch._plans[model]) == 1


def test_a_cached_function_that_others_call_costs_no_plan() -> None:
    read = functools.lru_cache(lambda n: 1.0)
    model = nn.Linear(3, 2).double()
    inner = metafast.InnerLoop(
        model, lambda out, y: F.mse_loss(out, y) * read(0), update=metafast.SGD(lr=0.1), steps=1, backend="native"
    )
    for step in range(3):
        inner(*tasks())
        read(step)
    assert len(dispatch._plans[model]) == 1


def test_a_native_replay_leaves_the_generators_of_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(3, 2).double()
    inner = metafast.InnerLoop(model, F.mse_loss, update=metafast.SGD(lr=0.1), steps=1, reduction="none")
    inner(*tasks())
    monkeypatch.setattr(random, "setstate", lambda state: pytest.fail("another thread may be drawing"))
    inner(*tasks()).mean().backward()


class Trainer:
    """An objective that is a method: of its owner's attributes it reads one."""

    def __init__(self) -> None:
        self.model, self.step, self.gain = nn.Linear(3, 2).double(), 0, 1.0
        self.inner = metafast.InnerLoop(self.model, objective=self.loss, update=metafast.SGD(lr=0.1), steps=1)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1]) * self.gain


def test_what_no_code_names_and_numbers_of_the_rule_make_no_new_plan() -> None:
    trainer = Trainer()
    for step in range(3):
        trainer.step = step
        trainer.inner.update.lr = 0.1 / (step + 1)  # type: ignore[assignment]
        agree(trainer.inner)
    assert len(dispatch._plans[trainer.model]) == 1
    trainer.gain = 2.0
    agree(trainer.inner)
    assert len(dispatch._plans[trainer.model]) == 2


def test_a_cache_that_the_first_run_fills_still_goes_native() -> None:
    cache: dict[str, Tensor] = {}

    def loss(out: Tensor, y: Tensor) -> Tensor:
        if "w" not in cache:
            cache["w"] = torch.linspace(0, 1, 2, dtype=F64)
        return ((out - y) ** 2 * cache["w"]).mean()

    agree(metafast.InnerLoop(nn.Linear(3, 2).double(), loss, update=metafast.SGD(lr=0.1), steps=1))


def test_a_cache_that_is_emptied_is_filled_again() -> None:
    """A plan made with a full cache is none for calls with an empty one, though the call it was made for began so."""
    cache: dict[str, Tensor] = {}
    source = torch.linspace(0, 1, 2, dtype=F64)

    def loss(out: Tensor, y: Tensor) -> Tensor:
        if "w" not in cache:
            cache["w"] = source.clone()
        return ((out - y) ** 2 * cache["w"]).mean()

    net, rule = nn.Linear(3, 2).double(), metafast.SGD(lr=0.1)
    native, eager = (metafast.InnerLoop(net, loss, update=rule, steps=1, backend=b) for b in ("native", "torch"))
    for _ in range(4):
        cache.clear()
        source.mul_(2)
        loss_now = native.meta_gradient(*tasks())[0]
        assert torch.equal(cache.get("w", source * 0), source)
        torch.testing.assert_close(loss_now, eager.meta_gradient(*tasks())[0], rtol=1e-9, atol=1e-12)


def test_the_key_keeps_no_object_alive_and_tells_numbers_apart() -> None:
    net = nn.Linear(3, 2)

    def key(value: Any) -> Any:
        return Reach(net, lambda: value).key

    assert key(1) != key(1.0) != key(True)
    assert key(0.0) != key(-0.0)
    assert key([1, 2]) == key([1, 2]) != key((1, 2))
    gone = key(SPACE.tensor.clone())
    assert gone != key(SPACE.tensor.clone())  # though the second may lie where the first lay
