"""Hyper-parameters of update rules: every kind that can be given, what it receives, what is refused."""

from __future__ import annotations

import copy
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from loops import LR, TASKS, Tied, backends, close, data, expected, loop, minimised, mlp
from torch import Tensor, nn

import metafast
from metafast import dispatch
from metafast.errors import InputError, InputTypeError
from metafast.updates import per_parameter

pytestmark = pytest.mark.filterwarnings("ignore::metafast.FallbackWarning")


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


@backends
@pytest.mark.parametrize("kind", ["float", "int", "tensor", "parameter", "plain"])
def test_one_rate_for_all(backend: str, kind: str) -> None:
    model, support, query = mlp(), data(0), data(1)
    source = scalar(LR).requires_grad_()
    value = {
        "float": LR, "int": 1, "tensor": scalar(LR), "parameter": nn.Parameter(scalar(LR)), "plain": source * 1.0,
    }[kind]  # fmt: skip
    rule = metafast.SGD(lr=value)
    inner = loop(model, backend, update=rule)
    answer = expected(model, support, query, hyper={"lr": scalar(1.0 if kind == "int" else LR)})
    inner(support, query).backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad, answer.params[name])
    assert [n for n, _ in rule.named_parameters()] == (["lr"] if kind == "parameter" else [])
    if kind == "parameter":
        close(rule.lr.grad, answer.hyper["lr"])
    if kind == "plain":
        close(source.grad, answer.hyper["lr"])


@backends
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("order", [1, 2])
def test_a_rate_for_each_parameter(backend: str, wide: bool, order: int) -> None:
    model, support, query = mlp(), data(0), data(1)
    torch.manual_seed(4)
    rates = {n: torch.rand(p.shape if wide else (), dtype=torch.float64) for n, p in model.named_parameters()}
    rule = metafast.SGD(lr={n: nn.Parameter(r.clone()) for n, r in rates.items()})
    assert [n for n, _ in rule.named_parameters()] == [f"lr.{n}" for n in rates]
    inner = loop(model, backend, update=rule, order=order)
    answer = expected(model, support, query, hyper={"lr": rates}, order=order)
    inner(support, query).backward()
    for name in rates:
        close(rule.get_parameter(f"lr.{name}").grad, answer.hyper[f"lr.{name}"])
        close(model.get_parameter(name).grad, answer.params[name])
    _, grads = inner.meta_gradient(support, query)
    close(grads["update.lr.2.bias"], answer.hyper["lr.2.bias"])
    twin = copy.deepcopy(inner)
    twin.load_state_dict(inner.state_dict())
    close(twin(support, query), answer.losses.mean())


@backends
def test_a_mapping_may_mix_kinds_and_name_a_tied_parameter_by_any_name(backend: str) -> None:
    torch.manual_seed(5)
    model, support, query = Tied().double(), data(0), data(1)
    names = [n for n, _ in model.named_parameters()]
    rates: dict[str, Any] = dict.fromkeys(names, 0.2)
    del rates["first.weight"]
    rates["second.weight"] = nn.Parameter(scalar(0.4))
    rates["head.bias"] = scalar(0.1)
    rule = metafast.SGD(lr=rates)
    hyper = {n: scalar(0.2) for n in names} | {"first.weight": scalar(0.4), "head.bias": scalar(0.1)}
    answer = expected(model, support, query, hyper={"lr": hyper})
    loop(model, backend, update=rule)(support, query).backward()
    close(rule.get_parameter("lr.second.weight").grad, answer.hyper["lr.first.weight"])
    close(model.head.bias.grad, answer.params["head.bias"])


@backends
@pytest.mark.parametrize("name", ["items", "bind", "_names", "_first", "type", "half"])
def test_a_mapping_names_parameters_of_modules_called_like_attributes(backend: str, name: str) -> None:
    if backend == "torch" and hasattr(nn.Module, name):
        pytest.skip("torch.func.functional_call takes the method for the module")

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._modules[name] = nn.Linear(6, 4).double()
            self._parameters[name + "_"] = nn.Parameter(scalar(1.0))

        def forward(self, x: Tensor) -> Tensor:
            return self._parameters[name + "_"] * self._modules[name](x)

    rates = {f"{name}.weight": nn.Parameter(scalar(LR)), f"{name}.bias": scalar(LR), f"{name}_": LR}
    model, support, query = Named(), data(0), data(1)
    inner = loop(model, backend, update=metafast.SGD(lr=rates))
    assert f"update.lr.{name}.weight" in inner.state_dict()
    close(copy.deepcopy(inner)(support, query), loop(model, backend)(support, query))


def test_a_mapping_with_two_rates_for_one_tied_parameter() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).double()
    model[1].weight = model[0].weight
    others = {"0.bias": 0.1, "1.bias": 0.1}
    shared = nn.Parameter(scalar(LR))
    for one, other in ((0.1, 9.0), (0.1, scalar(0.1)), (nn.Parameter(scalar(LR)), nn.Parameter(scalar(LR)))):
        with pytest.raises(InputError, match=r"SGD\(lr=...\): got different entries for '0.weight' and '1.weight'"):
            loop(model, loss=F.mse_loss, update=metafast.SGD(lr={"0.weight": one, "1.weight": other, **others}))
    for one, other in ((0.1, 0.1), (shared, shared), (scalar(LR), scalar(LR))):
        loop(model, loss=F.mse_loss, update=metafast.SGD(lr={"0.weight": one, "1.weight": other, **others}))


@backends
def test_one_learned_rate_shared_by_two_parameters_is_one_entry(backend: str) -> None:
    model, support, query = mlp(), data(0), data(1)
    shared = nn.Parameter(scalar(LR))
    rule = metafast.SGD(lr={n: shared for n, _ in model.named_parameters()})
    _, grads = loop(model, backend, update=rule).meta_gradient(support, query)
    close(grads["update.lr.0.weight"], expected(model, support, query).hyper["lr"])
    assert [n for n in grads if n.startswith("update")] == ["update.lr.0.weight"]


def decay(params: Any, grads: Any, state: Any, hyper: Any, k: Tensor, params0: Any) -> Any:
    """Reads k, the initial parameters and a state."""
    count = state["count"] + 1
    return {
        n: p - hyper["lr"] / (k + 1) * grads[n] + hyper["pull"] * count * (params0[n] - p) for n, p in params.items()
    }, {"count": count}


def counter(params: Any, hyper: Any) -> Any:
    return {"count": torch.zeros_like(hyper["lr"])}


@backends
@pytest.mark.parametrize("order", [1, 2])
def test_a_rule_of_functions(backend: str, order: int) -> None:
    model, support, query = mlp(), data(0), data(1)
    values = {"lr": scalar(0.3), "pull": scalar(0.05)}
    rule = metafast.UpdateRule(counter, decay, **{n: nn.Parameter(v.clone()) for n, v in values.items()})
    answer = expected(model, support, query, hyper=values, init=counter, update=decay, order=order, steps=3)
    inner = loop(model, backend, update=rule, order=order, steps=3)
    inner(support, query).backward()
    for name in values:
        close(getattr(rule, name).grad, answer.hyper[name])
    for name, parameter in model.named_parameters():
        close(parameter.grad, answer.params[name])


class Learned(metafast.UpdateRule):
    """A rule with a net of its own: its parameters are found as tensors in an attribute."""

    def __init__(self) -> None:
        super().__init__(lr=LR)
        self.net = nn.Linear(1, 1).double()

    def update(self, params: Any, grads: Any, state: Any, hyper: Any, k: Tensor, params0: Any) -> Any:
        step = {n: self.net(g.reshape(-1, 1)).reshape(g.shape) for n, g in grads.items()}
        return {n: p - hyper["lr"] * step[n] for n, p in params.items()}, state


@backends
def test_a_rule_with_a_net_learns_it(backend: str) -> None:
    model, support, query = mlp(), data(0), data(1)
    rule = Learned()
    inner = loop(model, backend, update=rule)
    assert {"update.net.weight", "update.net.bias"} <= {n for n, _ in inner.named_parameters()}

    def functional(params: Any, grads: Any, state: Any, hyper: Any, k: Tensor, params0: Any) -> Any:
        return rule.update(params, grads, state, hyper, k, params0)

    answer = expected(model, support, query, update=functional, externs=[rule.net.weight, rule.net.bias])
    inner(support, query).backward()
    close(rule.net.weight.grad, answer.externs[0])
    close(rule.net.bias.grad, answer.externs[1])
    close(inner.meta_gradient(support, query)[1]["update.net.bias"], answer.externs[1])


@backends
def test_setting_a_hyper_parameter_anew(backend: str) -> None:
    model, support, query = mlp(), data(0), data(1)
    rule = metafast.SGD(lr=LR)
    inner = loop(model, backend, update=rule)
    inner(support, query)
    for value in (0.1, scalar(0.1), nn.Parameter(scalar(0.1)), dict.fromkeys(dict(model.named_parameters()), 0.1), 0.1):
        rule.lr = value
        close(inner(support, query), expected(model, support, query, hyper={"lr": scalar(0.1)}).losses.mean())
    assert not list(rule.parameters())


def test_numbers_are_exact_in_float64() -> None:
    like = torch.zeros((), dtype=torch.float64)
    assert metafast.SGD(lr=0.1).hyper(like)["lr"].item() == 0.1


def test_per_parameter() -> None:
    one, other = torch.ones(()), torch.zeros(())
    assert per_parameter(one, "a") is one
    assert per_parameter({"a": one, "b": other}, "b") is other


# ---- refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        ("0.1", InputTypeError, "got str"),
        (None, InputTypeError, "got NoneType"),
        (True, InputTypeError, "got bool"),
        (torch.tensor(1), InputTypeError, "floating-point"),
        ({0: 0.1}, InputTypeError, "parameter names"),
        ({"0.weight": "x"}, InputTypeError, "got str"),
    ],
)
def test_hyper_parameters_of_a_wrong_type(value: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        metafast.SGD(lr=value)


def test_mappings_that_do_not_fit_the_model() -> None:
    names = [n for n, _ in mlp().named_parameters()]
    with pytest.raises(InputError, match=r"no entry for.*2.bias"):
        loop(mlp(), update=metafast.SGD(lr=dict.fromkeys(names[:3], 0.1)))
    with pytest.raises(InputError, match=r"entries for \['nothing'\]"):
        loop(mlp(), update=metafast.SGD(lr=dict.fromkeys([*names, "nothing"], 0.1)))
    with pytest.raises(InputError, match=r"got shape \(5,\) for 0.weight"):
        loop(mlp(), update=metafast.SGD(lr=dict.fromkeys(names, torch.ones(5))))
    with pytest.raises(InputError, match=r"expected \(\) or the parameter's \(7, 6\)"):
        loop(mlp(), update=metafast.SGD(lr=torch.ones(9, 9)))


@backends
@pytest.mark.parametrize("wrong", ["missing", "shape", "type"])
def test_rules_that_return_another_tree(backend: str, wrong: str) -> None:
    def update(params: Any, grads: Any, state: Any, hyper: Any, k: Tensor, params0: Any) -> Any:
        if wrong == "missing":
            return {n: p for n, p in params.items() if n != "0.bias"}, state
        if wrong == "shape":
            return {n: p.sum() for n, p in params.items()}, state
        return list(params.values()), state

    inner = loop(mlp(), backend, update=metafast.UpdateRule(update=update))
    with pytest.raises(InputError, match=r"task 0, inner step 0: update rule: got .* expected"):
        inner(data(0), data(1))


@pytest.mark.parametrize(
    "change",
    [lambda s, g: torch.cat([s, s]), lambda s, g: s[None], lambda s, g: s + g],
    ids=["grows", "wraps", "widens"],
)
def test_a_state_that_changes_shape_falls_back(change: Any) -> None:
    """A growing one went native, with a wrong result: its steps read and wrote the part that init had laid out."""

    class Shifty(metafast.UpdateRule):
        def init(self, params: Any, hyper: Any) -> Any:
            return {"sum": torch.ones(1, dtype=torch.float64)}

        def update(self, params: Any, grads: Any, state: Any, hyper: Any, k: Tensor, params0: Any) -> Any:
            s = state["sum"]
            after = {"sum": change(s, grads["2.bias"])}
            return {n: p - hyper["lr"] * s.sum() * grads[n] for n, p in params.items()}, after

    text = r"falls back to PyTorch: update in Shifty: its state changes shape from step to step, here from \(1,\) to"
    model, support, query = mlp(), data(0), data(1)
    with pytest.warns(metafast.FallbackWarning, match=text):
        loss = loop(model, "auto", update=Shifty(lr=LR), steps=3)(support, query)
    assert torch.equal(loss, loop(model, "torch", update=Shifty(lr=LR), steps=3)(support, query))


def test_a_rule_without_update() -> None:
    with pytest.raises(InputError, match="override update, or pass update="):
        loop(mlp(), update=metafast.UpdateRule(lr=0.1))


@backends
def test_a_rule_that_ignores_the_gradient(backend: str) -> None:
    model, support, query = mlp(), data(0), data(1)
    rule = metafast.UpdateRule(update=lambda p, g, s, h, k, p0: (p, s))
    answer = oracle.meta_gradient(model, minimised(F.cross_entropy), support, query, hyper={}, steps=0)
    inner = loop(model, backend, update=rule)
    close(inner(support, query), answer.losses.mean())
    assert inner.adapt(support)["0.bias"].shape == (TASKS, 7)


class ReadsItself(metafast.UpdateRule):
    """Gradient descent that finds its rate where a module keeps it."""

    def __init__(self, lr: float) -> None:
        super().__init__(lr=lr)

    def update(self, params, grads, state, hyper, k, params0):
        return {n: p - self.lr * grads[n] for n, p in params.items()}, state


@pytest.mark.parametrize("rule", [metafast.SGD, ReadsItself])
def test_a_schedule_of_the_rate_needs_one_plan(rule: type[metafast.UpdateRule]) -> None:
    model = nn.Linear(2, 1).double()
    batch = torch.randn(3, 4, 2, dtype=torch.float64), torch.randn(3, 4, 1, dtype=torch.float64)
    inner = metafast.InnerLoop(model, F.mse_loss, update=rule(0.1), steps=2, backend="native")
    losses = []
    for rate in (0.1, 0.05, 0.2):
        inner.update.lr = rate
        losses.append(inner.meta_gradient(batch, batch)[0])
        fresh = metafast.InnerLoop(model, F.mse_loss, update=rule(rate), steps=2, backend="torch")
        torch.testing.assert_close(losses[-1], fresh.meta_gradient(batch, batch)[0], rtol=1e-12, atol=0)
    assert len({float(loss) for loss in losses}) == 3
    assert len(dispatch._plans[model]) == 1
    assert inner.update.lr == 0.2
