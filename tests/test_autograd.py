"""The registered operations, and every way a transform can reach the call: right, or an error."""

from __future__ import annotations

import contextlib
import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import LR, backends, close, data, expected, loop, mlp
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import metafast
from metafast import autograd
from metafast.errors import BackendError, DoubleBackwardError, InputChangedError, TransformError

pytestmark = [
    pytest.mark.filterwarnings("ignore::metafast.FallbackWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning"),  # torch.func's own import
]


# ---- autograd ------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("way", ["mean", "none", "outputs", "adapt"])
def test_double_backward_raises(backend: str, way: str) -> None:
    model, support, query = mlp(), data(0), data(1)
    inner = loop(model, backend, reduction="none" if way == "none" else "mean", return_outputs=way == "outputs")
    if way == "adapt":
        value = inner.adapt(support)["0.weight"].square().sum()
    else:
        value = inner(support, query)
        value = value[0] + value[1].sum() if way == "outputs" else value.sum()
    grads = torch.autograd.grad(value, list(model.parameters()), create_graph=True, allow_unused=True)
    with pytest.raises(DoubleBackwardError, match="second differentiation"):
        sum(g.square().sum() for g in grads if g is not None).backward()


@backends
@pytest.mark.parametrize("way", ["mean", "none", "adapt"])
def test_differentiating_in_the_cotangent_raises(backend: str, way: str) -> None:
    model, support, query = mlp(), data(0), data(1)
    inner = loop(model, backend, reduction="none" if way == "none" else "mean")
    value = inner.adapt(support)["0.weight"] if way == "adapt" else inner(support, query)
    weight = torch.ones_like(value, requires_grad=True)  # jvp by two vjps, as torch.autograd.functional.jvp has it
    grads = torch.autograd.grad(value, list(model.parameters()), weight, create_graph=True)
    with pytest.raises(DoubleBackwardError, match="second differentiation"):
        torch.autograd.grad(grads, weight, [torch.ones_like(g) for g in grads], allow_unused=True)


@backends
def test_create_graph_alone_is_fine(backend: str) -> None:
    model, support, query = mlp(), data(0), data(1)
    loss = loop(model, backend)(support, query)
    penalty = sum(p.square().sum() for p in model.parameters())
    grads = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
    decay = torch.autograd.grad(penalty, list(model.parameters()), create_graph=True)
    answer = expected(model, support, query)
    for (name, parameter), grad, extra in zip(model.named_parameters(), grads, decay, strict=True):
        close(grad.detach(), answer.params[name])
        close(extra.detach(), 2 * parameter.detach())


@backends
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("what", ["parameter", "support", "label", "lr"])
def test_a_change_in_place_before_backward_raises(backend: str, reduction: str, what: str) -> None:
    model, support, query = mlp(), data(0), data(1)
    lr = nn.Parameter(torch.tensor(LR, dtype=torch.float64))
    loss = loop(model, backend, reduction=reduction, update=metafast.SGD(lr=lr))(support, query).sum()
    changed = {"parameter": model[0].weight, "support": support[0], "label": support[1], "lr": lr}[what]
    with torch.no_grad():
        changed.add_(1)
    with pytest.raises(InputChangedError, match="changed in place after the forward pass"):
        loss.backward()


@backends
@pytest.mark.parametrize("deferred", ["none", "adapt"])
@pytest.mark.parametrize("what", ["replaced", "written", "support"])
def test_a_change_behind_data_before_a_replay_raises(backend: str, deferred: str, what: str) -> None:
    """Autograd does not count it, and the tasks run again on what is there then."""
    model, support, query = mlp(), data(0), data(1)
    inner = loop(model, backend, reduction="none")
    loss = (inner(support, query) if deferred == "none" else inner.adapt(support)["0.weight"]).sum()
    before = support[0].data if what == "support" else model[0].weight.data
    if what == "written":
        model[0].weight.data.mul_(2)
    else:
        (support[0] if what == "support" else model[0].weight).data = before + 1
    with pytest.raises(InputChangedError, match=r"(param 0\.weight|support 0) with other memory or values"):
        loss.backward(retain_graph=True)
    if what != "written":
        (support[0] if what == "support" else model[0].weight).data = before
        loss.backward()


@backends
@pytest.mark.parametrize("what", ["closure", "constant", "eval"])
def test_a_change_of_what_the_losses_read_before_a_replay_raises(backend: str, what: str) -> None:
    model, support, query = mlp(), data(0), data(1)
    gain, constant = [1.0], torch.ones((), dtype=torch.float64)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output * gain[0] * constant, target)

    ready, deferred = (loop(model, backend, loss, reduction=r)(support, query).sum() for r in ("mean", "none"))
    if what == "eval":
        model.eval()
    elif what == "closure":
        gain[0] = 2.0
    else:
        constant.mul_(2)
    ready.backward()
    with pytest.raises(InputChangedError, match="something else that the losses read"):
        deferred.backward(retain_graph=True)
    if what == "eval":
        model.train()
        deferred.backward()


@backends
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice(backend: str, reduction: str) -> None:
    model, support, query = mlp(), data(0), data(1)
    loss = loop(model, backend, reduction=reduction)(support, query).mean()
    loss.backward(retain_graph=True)
    loss.backward()
    for name, want in expected(model, support, query).params.items():
        close(model.get_parameter(name).grad, 2 * want)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@backends
def test_hooks_on_parameters_and_on_the_loss_see_the_gradient(backend: str) -> None:
    model, support, query = mlp(), data(0), data(1)
    seen = []
    model[0].weight.register_hook(lambda g: seen.append(g.clone()))
    loop(model, backend)(support, query).backward()
    close(seen[0], expected(model, support, query).params["0.weight"])


# ---- registered operations -----------------------------------------------------------------------------------


def made_call(backend: str, way: str) -> autograd.Call:
    """The call that a user's call would launch."""
    inner = loop(mlp(), backend, reduction="none" if way == "none" else "mean", return_outputs=way == "outputs")
    found: list[autograd.Call] = []
    launch = autograd.launch

    def spy(call: autograd.Call) -> list[Tensor]:
        found.append(call)
        return launch(call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metafast.inner_loop.launch", spy)
        if way == "adapt":
            inner.adapt(data(0))
        else:
            inner(data(0), data(1))
    return found[0]


# opcheck itself, from torch 2.14 on, reads `.grad` of clones that are no leaves, and silences that only where shown.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@backends
@pytest.mark.parametrize("way", ["mean", "none", "outputs", "adapt"])
def test_opcheck(backend: str, way: str) -> None:
    call = made_call(backend, way)
    number = autograd._register(call)
    leaves = [leaf.detach().clone().requires_grad_(leaf.requires_grad) for leaf in call.problem.leaves.values()]
    torch.library.opcheck(torch.ops.metafast.replay.default, (leaves, number))
    cotangents = [torch.randn(t.shape, dtype=t.dtype) for t in call.fake(leaves)[: call.differentiable]]
    if not call.ready:
        plain = [leaf.detach() for leaf in leaves]
        torch.library.opcheck(torch.ops.metafast.replay_vjp.default, (plain, cotangents, number))


@backends
@pytest.mark.parametrize("way", ["mean", "none", "outputs", "adapt"])
def test_the_operation_alone_differentiates_like_the_call(backend: str, way: str) -> None:
    call = made_call(backend, way)
    number = autograd._register(call)
    leaves = list(call.problem.leaves.values())
    direct = torch.ops.metafast.replay(leaves, number)[: call.differentiable]
    eager = autograd.launch(call)
    cotangents = [torch.randn_like(t) for t in eager]
    params = [leaf for leaf in leaves if leaf.requires_grad]
    got, want = (torch.autograd.grad(results, params, cotangents) for results in (direct, eager))
    for a, b, x, y in zip(got, want, params, params, strict=True):
        close(a, b)
        assert x is y
    for a, b in zip(direct, eager, strict=True):
        close(a, b)


def test_a_call_lives_as_long_as_its_graph() -> None:
    call = made_call("torch", "none")
    number = autograd._register(call)
    watch = weakref.ref(call)
    result = torch.ops.metafast.replay(list(call.problem.leaves.values()), number)[0]
    del call
    gc.collect()
    assert watch() is not None
    result.sum().backward()
    del result
    gc.collect()
    assert watch() is None
    with pytest.raises(BackendError, match=f"got call {number}, which is gone"):
        torch.ops.metafast.replay([], number)


# ---- torch.func ----------------------------------------------------------------------------------------------


def setting(backend: str, **options: Any) -> tuple[Any, dict[str, Tensor], Any, Any]:
    """`value(params, support x)` of the call, through functional_call on the InnerLoop."""
    model, support, query = mlp(), data(0), data(1)
    inner = loop(model, backend, **options)
    params = {n: p.detach() for n, p in inner.named_parameters()}

    def value(params: dict[str, Tensor], x: Tensor | None = None) -> Tensor:
        given = (support[0] if x is None else x, support[1])
        result = torch.func.functional_call(inner, params, (given, query))
        return (result[0] + result[1].square().sum() if isinstance(result, tuple) else result).mean()

    return value, params, support, query


MODEL = mlp()  # a transform cannot build one


def eager(params: dict[str, Tensor], x: Tensor, support: Any, query: Any) -> Tensor:
    """The same value written in plain torch."""
    total = torch.zeros((), dtype=torch.float64)
    model = MODEL
    for t in range(len(x)):
        phi = {n.removeprefix("model."): p for n, p in params.items()}
        for _ in range(2):

            def loss(phi: dict[str, Tensor], t: int = t) -> Tensor:
                return F.cross_entropy(torch.func.functional_call(model, phi, (x[t],)), support[1][t])

            grads = torch.func.grad(loss)(phi)
            phi = {n: p - LR * grads[n] for n, p in phi.items()}
        total = total + F.cross_entropy(torch.func.functional_call(model, phi, (query[0][t],)), query[1][t]) / len(x)
    return total


reductions = pytest.mark.parametrize("reduction", ["mean", "none"])


@backends
@reductions
def test_func_grad(backend: str, reduction: str) -> None:
    value, params, support, query = setting(backend, reduction=reduction)
    got = torch.func.grad(value)(params)
    want = torch.func.grad(eager)(params, support[0], support, query)
    for name in params:
        close(got[name], want[name])
    got_x = torch.func.grad(value, argnums=1)(params, support[0])
    close(got_x, torch.func.grad(eager, argnums=1)(params, support[0], support, query))


@backends
def test_func_grad_with_outputs(backend: str) -> None:
    value, params, _, _ = setting(backend, return_outputs=True)
    got = torch.func.grad(value)(params)
    live = {n: p.clone().requires_grad_() for n, p in params.items()}
    want = torch.autograd.grad(value(live), list(live.values()))
    for name, grad in zip(params, want, strict=True):
        close(got[name], grad)


@backends
@reductions
def test_vmap_of_grad_and_grad_of_vmap(backend: str, reduction: str) -> None:
    value, params, support, query = setting(backend, reduction=reduction)
    stacked = {n: torch.stack([p, 0.5 * p]) for n, p in params.items()}
    xs = torch.stack([support[0], 2 * support[0]])
    each = [({n: p[i] for n, p in stacked.items()}, xs[i]) for i in range(2)]

    values = torch.func.vmap(value)(stacked, xs)
    close(values, torch.stack([eager(p, x, support, query) for p, x in each]))
    got = torch.func.vmap(torch.func.grad(value))(stacked, xs)
    for i, (p, x) in enumerate(each):
        want = torch.func.grad(eager)(p, x, support, query)
        for name in params:
            close(got[name][i], want[name])

    total = torch.func.grad(lambda s: torch.func.vmap(value)(s, xs).sum())(stacked)
    for name in params:
        close(total[name], got[name])
    shared = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0))(params, xs)
    close(shared["model.0.bias"][0], torch.func.grad(eager)(params, xs[0], support, query)["model.0.bias"])


@backends
def test_jacrev_over_tasks(backend: str) -> None:
    model, support, query = mlp(), data(0), data(1)
    inner = loop(model, backend, reduction="none")
    params = {n: p.detach() for n, p in inner.named_parameters()}
    rows = torch.func.jacrev(lambda p: torch.func.functional_call(inner, p, (support, query)))(params)
    for t in range(3):
        alone = expected(model, *[tuple(b[t : t + 1] for b in batch) for batch in (support, query)])
        for name in alone.params:
            close(rows["model." + name][t], alone.params[name])


@backends
@reductions
def test_func_grad_of_grad_raises(backend: str, reduction: str) -> None:
    value, params, _, _ = setting(backend, reduction=reduction)

    def inner_norm(p: dict[str, Tensor]) -> Tensor:
        return sum(g.square().sum() for g in torch.func.grad(value)(p).values())

    with pytest.raises(DoubleBackwardError):
        torch.func.grad(inner_norm)(params)
    with pytest.raises((DoubleBackwardError, RuntimeError)):
        torch.func.hessian(value)(params)


@backends
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_batched_cotangents_raise(backend: str, reduction: str) -> None:
    model, support, query = mlp(), data(0), data(1)
    text = "is_grads_batched=True.*got several cotangents in one, expected one at a time; call torch.autograd.grad once"
    loss = loop(model, backend, reduction=reduction)(support, query)
    seeds = torch.eye(loss.numel(), dtype=loss.dtype).reshape(-1, *loss.shape)
    for create_graph in (False, True):
        with pytest.raises(TransformError, match=text):
            torch.autograd.grad(loss, model[0].weight, seeds, is_grads_batched=True, create_graph=create_graph)
    fast = loop(model, backend).adapt(support)["0.bias"]
    with pytest.raises(TransformError, match=text):
        torch.autograd.grad(fast, model[0].weight, torch.stack([fast, fast]).detach(), is_grads_batched=True)


@backends
def test_forward_mode_raises(backend: str) -> None:
    value, params, _, _ = setting(backend)
    with pytest.raises(TransformError, match=r"forward-mode.*expected reverse mode; use torch.func.grad"):
        torch.func.jvp(value, (params,), ({n: torch.ones_like(p) for n, p in params.items()},))
    model, support, query = mlp(), data(0), data(1)
    inner = loop(model, backend)
    for context in (contextlib.nullcontext, torch.no_grad):
        with forward_ad.dual_level(), context():
            dual = forward_ad.make_dual(support[0], torch.ones_like(support[0]))
            with pytest.raises(TransformError, match=r"forward-mode.*expected reverse mode"):
                inner((dual, support[1]), query)


@backends
def test_what_is_traced_without_values_raises(backend: str) -> None:
    """torch.export would else run the losses on tensors that have none."""
    value, params, _, _ = setting(backend)
    inner, batches = loop(mlp(), backend), (data(0), data(1))
    for call in (
        lambda: make_fx(lambda s, q: inner(s, q))(*batches),
        lambda: make_fx(lambda p: torch.func.grad(value)(p))(params),
        lambda: torch.func.linearize(value, params),
        lambda: torch.export.export(inner, batches),
    ):
        with pytest.raises(TransformError, match=r"make_fx, torch.export.*expected tensors with values"):
            call()
    assert torch.isfinite(inner(*batches))


@backends
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jit_trace_raises(backend: str) -> None:
    """The tracer itself would end the process, by a segmentation fault."""
    inner, support, query = loop(mlp(), backend), data(0), data(1)
    for call in (lambda x: inner((x, support[1]), query), lambda x: inner.adapt((x, support[1]))["0.weight"]):
        with pytest.raises(TransformError, match=r"jit.trace.*expected tensors with values"):
            torch.jit.trace(call, (support[0],))


@backends
def test_adapt_under_func_grad_and_vmap(backend: str) -> None:
    model, support, query = mlp(), data(0), data(1)
    inner = loop(model, backend)
    params = {n: p.detach() for n, p in inner.named_parameters()}

    def value(params: dict[str, Tensor]) -> Tensor:
        saved = dict(inner.named_parameters())
        with torch.nn.utils.stateless._reparametrize_module(inner, params):
            logits = inner.adapt(support)(query[0])
        assert all(a is b for a, b in zip(saved.values(), inner.parameters(), strict=True))
        return F.cross_entropy(logits.flatten(0, 1), query[1].flatten())

    got = torch.func.grad(value)(params)
    for name, want in expected(model, support, query).params.items():
        close(got["model." + name], want)


@backends
@pytest.mark.parametrize("place", ["closure", "attribute"])
def test_a_tensor_under_a_transform_in_a_closure_is_right_or_raises(backend: str, place: str) -> None:
    model, support, query = mlp(), data(0), data(1)
    weight = torch.tensor(1.5, dtype=torch.float64)

    def value(w: Tensor) -> Tensor:
        if place == "attribute":
            model.scale = w

        def objective(m: nn.Module, b: Any) -> Tensor:
            return F.cross_entropy(m(b[0]), b[1]) * (w if place == "closure" else m.scale)

        return loop(model, backend, None, objective=objective)(support, query)

    live = weight.clone().requires_grad_()
    (want,) = torch.autograd.grad(value(live), live)
    try:
        got = torch.func.grad(value)(weight)
    except (TransformError, RuntimeError):
        return
    close(got, want)


@backends
def test_randomness_under_vmap_of_grad_is_the_same_in_the_replay(backend: str) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 9), nn.Linear(9, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.dropout(torch.tanh(self.a(x)), 0.5))

    torch.manual_seed(0)
    inner = loop(Noisy().double(), backend, reduction="none")
    support, query = data(0), data(1)
    params = {n: p.detach() for n, p in inner.named_parameters()}
    stacked = {n: torch.stack([p, p]) for n, p in params.items()}

    def value(p: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(inner, p, (support, query)).mean()

    torch.manual_seed(5)
    got = torch.func.vmap(torch.func.grad(value))(stacked)
    torch.manual_seed(5)
    live = {n: p.clone().requires_grad_() for n, p in params.items()}
    for name, want in zip(params, torch.autograd.grad(value(live), list(live.values())), strict=True):
        for i in range(2):
            close(got[name][i], want)


# ---- torch.compile -------------------------------------------------------------------------------------------


@pytest.fixture
def dynamo() -> Any:
    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()


@backends
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("way", ["mean", "none", "adapt", "meta_gradient"])
def test_a_training_step_under_compile(backend: str, way: str, dynamo: Any) -> None:
    model, support, query = mlp(), data(0), data(1)
    inner = loop(model, backend, reduction="none" if way == "none" else "mean")

    def step(support: Any, query: Any) -> Tensor:
        scaled = (support[0] * 1.0, support[1])
        if way == "meta_gradient":
            return inner.meta_gradient(scaled, query)[0] * 2.0
        if way == "adapt":
            logits = inner.adapt(scaled)(query[0])
            loss = F.cross_entropy(logits.flatten(0, 1), query[1].flatten())
        else:
            loss = inner(scaled, query).mean()
        loss.backward()
        return loss * 2.0

    compiled = torch.compile(step, backend="aot_eager")
    answer = expected(model, support, query)
    for _ in range(2):
        model.zero_grad()
        close(compiled(support, query).detach(), 2 * answer.losses.mean())
        if way != "meta_gradient":
            for name, parameter in model.named_parameters():
                close(parameter.grad, answer.params[name])


@backends
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@reductions
def test_compile_of_func_grad_is_right_or_raises(backend: str, reduction: str, dynamo: Any) -> None:
    value, params, support, query = setting(backend, reduction=reduction)
    want = torch.func.grad(eager)(params, support[0], support, query)
    compiled = torch.compile(lambda p: torch.func.grad(value)(p), backend="aot_eager")
    try:
        got = compiled(params)
    except Exception as error:  # whichever of dynamo's
        assert type(error).__module__.startswith(("torch", "metafast", "builtins"))
        return
    for name in params:
        close(got[name], want[name])


@pytest.mark.parametrize("backend", ["torch", "native"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("what", ["model", "model in place", "loss"])
def test_what_is_compiled_already(backend: str, what: str, dynamo: Any) -> None:
    """Dynamo would look at the frames of capture, and aot_autograd has no second derivative."""
    model, support, query = mlp(), data(0), data(1)
    answer = expected(model, support, query)
    used, loss = model, F.cross_entropy
    if what == "model":
        used = torch.compile(model, backend="aot_eager")
    elif what == "model in place":
        model.compile(backend="aot_eager")
    else:
        loss = torch.compile(loss, backend="aot_eager")
    loss(used(support[0][0]), support[1][0])
    loop(used, backend, loss)(support, query).backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad, answer.params[name])
    assert torch._dynamo.eval_frame._stance.stance == "default"
