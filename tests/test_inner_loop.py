"""What a user types: values against the eager oracle, options, and what a call leaves alone."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import warnings
import weakref
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from loops import LR, TASKS, WAYS, backends, check_grads, close, data, expected, loop, minimised, mlp
from torch import Tensor, nn

import metafast
from metafast.errors import InputTypeError

pytestmark = pytest.mark.filterwarnings("ignore::metafast.FallbackWarning")


# ---- the two ways out ----------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_fused_adapt_and_meta_gradient_agree_with_the_oracle(backend: str, order: int, steps: int) -> None:
    model, support, query = mlp(), data(0), data(1, 7)
    inner = loop(model, backend, steps=steps, order=order)
    answer = expected(model, support, query, steps=steps, order=order)

    loss = inner(support, query)
    assert loss.shape == ()
    close(loss, answer.losses.mean())
    loss.backward()
    check_grads(model, answer)

    model.zero_grad()
    value, grads = inner.meta_gradient(support, query)
    close(value, answer.losses.mean())
    assert list(grads) == [name for name, _ in model.named_parameters()]
    assert all(p.grad is None for p in model.parameters())
    for name, grad in grads.items():
        close(grad, answer.params[name])

    fast = inner.adapt(support)
    for name, tensor in fast.items():
        close(tensor, answer.fast[name])
    logits = fast(query[0])
    assert logits.shape == (TASKS, 7, WAYS)
    F.cross_entropy(logits.flatten(0, 1), query[1].flatten()).backward()
    check_grads(model, answer)


@backends
def test_reduction_sum_and_none(backend: str) -> None:
    model, support, query = mlp(), data(0), data(1)
    answer = expected(model, support, query)
    total = loop(model, backend, reduction="sum")(support, query)
    close(total, answer.losses.sum())
    total.backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad, TASKS * answer.params[name])

    losses = loop(model, backend, reduction="none")(support, query)
    assert losses.shape == (TASKS,)
    close(losses, answer.losses)
    for task in range(TASKS):  # any weights: here one task alone
        alone = expected(model, *[tuple(t[task : task + 1] for t in batch) for batch in (support, query)])
        grads = torch.autograd.grad(losses[task], list(model.parameters()), retain_graph=True)
        for grad, want in zip(grads, alone.params.values(), strict=True):
            close(grad, want)


@backends
def test_scaling_of_the_upstream_gradient(backend: str) -> None:
    model, support, query = mlp(), data(0), data(1)
    answer = expected(model, support, query)
    (3.0 * loop(model, backend)(support, query)).backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad, 3.0 * answer.params[name])


@backends
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_outputs_are_returned_and_differentiable(backend: str, reduction: str) -> None:
    model, support, query = mlp(), data(0), data(1)
    loss, logits = loop(model, backend, return_outputs=True, reduction=reduction)(support, query)
    assert logits.shape == (TASKS, 5, WAYS)
    cotangent = torch.randn_like(logits)
    (loss.sum() + (logits * cotangent).sum()).backward()
    grads = [p.grad.clone() for p in model.parameters()]

    plain = loop(model, "torch").adapt(support)
    model.zero_grad()
    want = plain(query[0])
    scale = TASKS if reduction == "none" else 1
    ce = scale * F.cross_entropy(want.flatten(0, 1), query[1].flatten())
    (ce + (want * cotangent).sum()).backward()
    close(logits, want)
    for grad, parameter in zip(grads, model.parameters(), strict=True):
        close(grad, parameter.grad)


@backends
def test_outputs_keep_their_dtypes(backend: str) -> None:
    def objective(model: nn.Module, batch: Any) -> Any:
        logits = model(batch[0])
        best = logits.argmax(1)
        return F.cross_entropy(logits, batch[1]), [logits, best, best == batch[1], batch[1] + 1]

    model, support, query = mlp(), data(0), data(1)
    backend = "native" if backend == "auto" else backend
    loss, outputs = loop(model, backend, None, objective=objective, return_outputs=True)(support, query)
    kinds = [torch.float64, torch.int64, torch.bool, torch.int64]
    assert [t.dtype for t in outputs] == kinds and [t.requires_grad for t in outputs] == [True, False, False, False]
    assert torch.equal(outputs[1], outputs[0].argmax(-1)) and torch.equal(outputs[3], query[1] + 1)
    assert torch.equal(outputs[2], outputs[1] == query[1])
    loss.backward()
    check_grads(model, expected(model, support, query))


@backends
def test_outputs_alone_carry_a_gradient(backend: str) -> None:
    model, support, query = mlp(), data(0), data(1)
    _, logits = loop(model, backend, return_outputs=True)(support, query)
    logits.square().sum().backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    loop(model, "torch").adapt(support)(query[0]).square().sum().backward()
    for grad, parameter in zip(got, model.parameters(), strict=True):
        close(grad, parameter.grad)


# ---- losses and batches --------------------------------------------------------------------------------------


@backends
def test_objective_over_nested_batches(backend: str) -> None:
    model = mlp()

    def objective(model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        logits = model(batch["input"])
        losses = F.cross_entropy(logits, batch["target"][0], reduction="none")
        return (losses * batch["target"][1]).sum(), {"logits": logits, "losses": losses}

    def batch(seed: int) -> dict[str, Any]:
        x, y = data(seed)
        return {"input": x, "target": [y, torch.rand(y.shape, dtype=torch.float64)]}

    support, query = batch(0), batch(1)
    answer = expected(model, support, query, lambda m, b: objective(m, b)[0])
    inner = loop(model, backend, None, objective=objective, return_outputs=True)
    loss, outputs = inner(support, query)
    close(loss, answer.losses.mean())
    assert outputs["logits"].shape == (TASKS, 5, WAYS)
    assert outputs["losses"].shape == (TASKS, 5)
    loss.backward()
    check_grads(model, answer)


@backends
def test_query_loss_and_query_objective(backend: str) -> None:
    model, support, query = mlp(), data(0), data(1)

    def outer(output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, F.one_hot(target, WAYS).to(output.dtype))

    answer = expected(model, support, query, query_objective=minimised(outer))
    for options in ({"query_loss": outer}, {"query_objective": minimised(outer)}):
        model.zero_grad()
        loss = loop(model, backend, **options)(support, query)
        close(loss, answer.losses.mean())
        loss.backward()
        check_grads(model, answer)


@backends
@pytest.mark.parametrize("int_type", [torch.int64, torch.int32, torch.uint8])
def test_strides_and_integer_labels(backend: str, int_type: torch.dtype) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(100, WAYS)).double()
    one_hot = int_type != torch.int64  # PyTorch's cross_entropy wants int64: other types go through one_hot

    def loss(output: Tensor, target: Tensor) -> Tensor:
        target = target.long() if one_hot else target
        return F.cross_entropy(output, target)

    x = torch.randn(TASKS, 5, 3, 5, 5, dtype=torch.float64)
    y = torch.randint(0, WAYS, (TASKS, 5)).to(int_type)
    model_answer = expected(model, (x, y), (x, y), minimised(loss))
    last = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    odd = torch.stack([x, x], -1)[..., 0]
    expanded = y.unsqueeze(-1).expand(-1, -1, 3)[..., 1]
    for inputs in (last, odd):
        model.zero_grad()
        value = loop(model, backend, loss)((inputs, expanded), (inputs, y))
        close(value, model_answer.losses.mean())
        value.backward()
        check_grads(model, model_answer)


@backends
@pytest.mark.parametrize("examples", [1, 2])
def test_one_task_one_shot_one_way(backend: str, examples: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 1).double()
    support = (torch.randn(1, examples, 6, dtype=torch.float64), torch.zeros(1, examples, dtype=torch.int64))
    value = loop(model, backend)(support, support)
    close(value, torch.zeros((), dtype=torch.float64))
    value.backward()
    assert all(not p.grad.any() for p in model.parameters())


@backends
def test_float32(backend: str) -> None:
    model, (x, y) = mlp().float(), data(0)
    support = (x.float(), y)
    value, grads = loop(model, backend).meta_gradient(support, support)
    assert value.dtype == torch.float32
    answer = expected(model.double(), (x, y), (x, y))
    for name, grad in grads.items():
        torch.testing.assert_close(grad.double(), answer.params[name], rtol=2e-4, atol=2e-6)


# ---- FastWeights ---------------------------------------------------------------------------------------------


@backends
def test_fast_weights_is_a_mapping(backend: str) -> None:
    model, support = mlp(), data(0)
    fast = loop(model, backend).adapt(support)
    assert isinstance(fast, metafast.FastWeights)
    assert list(fast) == [name for name, _ in model.named_parameters()]
    assert len(fast) == 4
    assert fast["0.weight"].shape == (TASKS, 7, 6)
    assert fast.task(1)["0.bias"].shape == (7,)
    assert torch.equal(fast.task(-1)["0.bias"], fast["0.bias"][TASKS - 1])
    assert "3 tasks" in repr(fast)
    with pytest.raises(KeyError, match="no adapted parameter"):
        fast["nothing"]
    with pytest.raises(IndexError, match="expected 0"):
        fast.task(TASKS)
    assert torch.equal(fast.task(torch.tensor(1))["0.bias"], fast["0.bias"][1])  # type: ignore[arg-type]
    for wrong in (1.0, "a"):
        with pytest.raises(InputTypeError, match=rf"FastWeights.task\(index\): got {wrong!r}, expected an int; pass a"):
            fast.task(wrong)  # type: ignore[arg-type]


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@backends
@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f)), saved])
def test_fast_weights_are_copied_pickled_and_saved(backend: str, again: Any) -> None:
    model = nn.Sequential(mlp(), nn.BatchNorm1d(WAYS, affine=False).double())
    with torch.no_grad():
        fast = loop(model, backend).adapt(data(0))
        twin = again(fast)
        assert isinstance(twin, metafast.FastWeights) and twin.tasks == TASKS
        assert list(twin) == list(fast) and all(torch.equal(twin[name], fast[name]) for name in fast)
        assert torch.equal(twin(data(1)[0]), fast(data(1)[0]))


def test_fast_weights_with_a_graph_are_copied_as_tensors_are() -> None:
    fast = loop(mlp()).adapt(data(0))
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(fast)
    twin = pickle.loads(pickle.dumps(fast))
    assert all(tensor.is_leaf and torch.equal(tensor, fast[name]) for name, tensor in twin.items())


@backends
def test_fast_weights_take_a_loss_on_one_task_alone(backend: str) -> None:
    model, support, query = mlp(), data(0), data(1)
    fast = loop(model, backend).adapt(support)
    logits = torch.func.functional_call(model, fast.task(1), (query[0][1],))
    F.cross_entropy(logits, query[1][1]).backward()
    check_grads(model, expected(model, *[tuple(t[1:2] for t in batch) for batch in (support, query)]))


def test_fast_weights_take_nested_inputs() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, WAYS)

        def forward(self, batch: Any, *, shift: Tensor) -> dict[str, Tensor]:
            return {"sum": self.layer(batch["a"] + batch["b"]) + shift}

    model = Two().double()
    x, y = data(0)
    inner = metafast.InnerLoop(
        model,
        objective=lambda m, b: F.cross_entropy(m({"a": b[0], "b": b[0]}, shift=b[0].new_zeros(()))["sum"], b[1]),
        update=metafast.SGD(lr=LR),
        steps=1,
        backend="torch",
    )
    out = inner.adapt((x, y))({"a": x, "b": x}, shift=torch.ones(TASKS, 1, dtype=torch.float64))
    assert out["sum"].shape == (TASKS, 5, WAYS)


# ---- a module ------------------------------------------------------------------------------------------------


@backends
def test_it_is_a_module(backend: str) -> None:
    model, support, query = mlp(), data(0), data(1)
    inner = loop(model, backend, update=metafast.SGD(lr=nn.Parameter(torch.tensor(LR, dtype=torch.float64))))
    names = [name for name, _ in inner.named_parameters()]
    assert names == [f"model.{n}" for n, _ in model.named_parameters()] + ["update.lr"]
    optimiser = torch.optim.Adam(inner.parameters(), lr=0.01)
    before = inner(support, query).item()
    for _ in range(5):
        optimiser.zero_grad()
        inner(support, query).backward()
        optimiser.step()
    assert inner(support, query).item() < before


@backends
def test_state_dict_pickle_and_deepcopy(backend: str) -> None:
    model, support, query = mlp(), data(0), data(1)
    inner = loop(model, backend, update=metafast.SGD(lr=nn.Parameter(torch.tensor(LR, dtype=torch.float64))))
    want = inner(support, query)
    torch.manual_seed(9)
    other = loop(nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, WAYS)).double(), backend,
                 update=metafast.SGD(lr=nn.Parameter(torch.tensor(0.7, dtype=torch.float64))))
    other.load_state_dict(inner.state_dict())
    for twin in (other, pickle.loads(pickle.dumps(inner)), copy.deepcopy(inner)):
        got = twin(support, query)
        close(got, want)
        got.backward()
        assert twin.update.lr.grad is not None
    assert all(p.grad is None for p in inner.parameters())


@backends
def test_the_model_may_change_between_calls(backend: str) -> None:
    model, support, query = mlp(), data(0), data(1)
    inner = loop(model, backend)
    inner(support, query)
    model[2] = nn.Linear(7, WAYS, bias=False).double()
    inner(support, query).backward()
    check_grads(model, expected(model, support, query))
    model.add_module("3", nn.Linear(WAYS, WAYS).double())
    close(inner(support, query), expected(model, support, query).losses.mean())
    model[3].weight = nn.Parameter(torch.randn(WAYS, WAYS, dtype=torch.float64))
    close(inner(support, query), expected(model, support, query).losses.mean())
    model[3].bias = None
    close(inner(support, query), expected(model, support, query).losses.mean())
    model.insert(3, nn.Linear(WAYS, WAYS).double())
    model[3].weight = model[4].weight  # tied afterwards
    model.zero_grad()
    inner(support, query).backward()
    check_grads(model, expected(model, support, query))


@backends
def test_options_may_change_between_calls(backend: str) -> None:
    model, support, query = mlp(), data(0), data(1)
    inner = loop(model, backend)
    inner(support, query)
    inner.steps, inner.order = 3, 1
    inner.update.lr = 0.1
    hyper = {"lr": torch.tensor(0.1, dtype=torch.float64)}
    inner(support, query).backward()
    check_grads(model, expected(model, support, query, steps=3, order=1, hyper=hyper))


@backends
@pytest.mark.filterwarnings("ignore::metafast.FallbackWarning")
def test_a_found_tensor_that_the_loss_writes_to_keeps_its_gradient(backend: str) -> None:
    """As CLIP keeps its temperature in bounds."""
    scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def loss(out: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            scale.clamp_(0.0, 4.0)
        return F.cross_entropy(out * scale, y)

    loop_ = metafast.InnerLoop(mlp(), loss, update=metafast.SGD(lr=LR), steps=1, order=1, backend=backend)
    loop_(data(0), data(1)).backward()
    assert scale.grad is not None and scale.grad.abs() > 1e-6


# ---- what a call leaves alone --------------------------------------------------------------------------------


@backends
def test_no_grad_runs_only_the_forward(backend: str) -> None:
    model, support, query = mlp(), data(0), data(1)
    inner = loop(model, backend)
    with torch.no_grad():
        loss = inner(support, query)
        fast = inner.adapt(support)
        _, grads = inner.meta_gradient(support, query)
    assert not loss.requires_grad and not fast["0.weight"].requires_grad
    close(loss, expected(model, support, query).losses.mean())
    close(grads["0.weight"], expected(model, support, query).params["0.weight"])


@backends
def test_inference_mode(backend: str) -> None:
    model, support, query = mlp(), data(0), data(1)
    with torch.inference_mode():
        x = support[0] * 1.0
        loss = loop(model, backend)((x, support[1]), query)
    close(loss.clone(), expected(model, support, query).losses.mean())


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 16), nn.Linear(16, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.dropout(torch.tanh(self.a(x)), 0.5, self.training))


def draws_of_the_eager_loop(model: nn.Module, support: Any, query: Any) -> oracle.Answer:
    torch.manual_seed(11)
    return expected(model, support, query)


@backends
@pytest.mark.parametrize("way", ["mean", "none", "adapt", "no_grad"])
def test_random_draws_are_those_of_the_eager_loop_and_of_the_replay(backend: str, way: str) -> None:
    torch.manual_seed(6)
    model, support, query = Noisy().double(), data(0), data(1)
    answer = draws_of_the_eager_loop(model, support, query)
    after = torch.get_rng_state()
    inner = loop(model, backend, reduction="none" if way == "none" else "mean")
    inner(support, query)  # a first call may look around; it must not disturb the draws
    torch.manual_seed(11)
    if way == "no_grad":
        with torch.no_grad():
            close(inner(support, query), answer.losses.mean())
        return
    if way == "adapt":
        inner.adapt(support)  # shifts the draws: compare the replay with the first pass below
        torch.manual_seed(11)
        fast = inner.adapt(support)
        total = sum(t.square().sum() for t in fast.values())
        torch.rand(7)
        grads = torch.autograd.grad(total, list(model.parameters()))
        torch.manual_seed(11)
        phi = {}
        for t in range(TASKS):
            phi[t] = dict(model.named_parameters())
            for _ in range(2):
                loss = F.cross_entropy(torch.func.functional_call(model, phi[t], (support[0][t],)), support[1][t])
                step = torch.autograd.grad(loss, list(phi[t].values()), create_graph=True)
                phi[t] = {n: p - LR * g for (n, p), g in zip(phi[t].items(), step, strict=True)}
        want = sum(p.square().sum() for task in phi.values() for p in task.values())
        for grad, w in zip(grads, torch.autograd.grad(want, list(model.parameters())), strict=True):
            close(grad, w)
        return
    loss = inner(support, query)
    assert torch.equal(torch.get_rng_state(), after)
    close(loss.mean(), answer.losses.mean())
    torch.rand(5)
    state = torch.get_rng_state()
    loss.mean().backward()
    assert torch.equal(torch.get_rng_state(), state)
    check_grads(model, answer)


@backends
def test_nothing_of_the_users_changes(backend: str) -> None:
    model, support, query = mlp(), data(0), data(1)
    model.register_buffer("unused", torch.ones(3))
    model.forward = lambda x: model[2](model[1](model[0](x)))
    before = copy.deepcopy(model.state_dict())
    versions = [t._version for t in (*model.parameters(), *model.buffers(), *support, *query)]
    inner = loop(model, backend)
    inner(support, query)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    inner(support, query)
    inner.adapt(support)
    inner.meta_gradient(support, query)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    assert [t._version for t in (*model.parameters(), *model.buffers(), *support, *query)] == versions
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_a_module_registered_twice_keeps_its_parameters_and_buffers(backend: str) -> None:
    """Two names for one place: who swaps both, and back in the same order, leaves there what he swapped in."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.norm = nn.Linear(3, 3).double(), nn.BatchNorm1d(3).double()
            self.also = nn.ModuleDict({"layer": self.layer, "norm": self.norm})

        def forward(self, x: Tensor) -> Tensor:
            h: Tensor = self.norm(self.also["layer"](torch.tanh(self.layer(x))))
            return h

    model = Twice()
    before = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    inner = metafast.InnerLoop(model, F.mse_loss, update=metafast.SGD(lr=0.1), steps=2, backend=backend)
    batch = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    losses = [inner(batch, batch), inner(batch, batch)]
    torch.testing.assert_close(*losses)
    inner.adapt(batch)(batch[0])
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)



@backends
def test_two_threads_at_once(backend: str) -> None:
    model, support, query = mlp(), data(0), data(1)
    inner = loop(model, backend, steps=3)
    want = expected(model, support, query, steps=3)
    found: list[Any] = []

    def work() -> None:
        with warnings.catch_warnings():
            for _ in range(5):
                found.append(inner.meta_gradient(support, query))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 10
    for loss, grads in found:
        close(loss, want.losses.mean())
        close(grads["0.weight"], want.params["0.weight"])


@backends
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_nothing_is_kept_alive(backend: str, reduction: str) -> None:
    model, support, query = mlp(), data(0), data(1)
    inner = loop(model, backend, reduction=reduction)
    inner(support, query).sum().backward()
    x = support[0].clone()
    watch = weakref.ref(x)
    loss = inner((x, support[1]), query)
    del x, loss
    gc.collect()
    assert watch() is None


def test_graphs_of_one_task_at_a_time() -> None:
    """The reference's peak of live tensors does not grow with the number of tasks."""
    peak = {}
    for count in (2, 16):
        model = mlp()
        x = torch.randn(count, 5, 6, dtype=torch.float64)
        y = torch.randint(0, WAYS, (count, 5))
        live: list[weakref.ref[Tensor]] = []
        most = 0

        def objective(m: nn.Module, b: Any, live: list[Any] = live) -> Tensor:
            nonlocal most
            h = m(b[0])
            live.append(weakref.ref(h))
            most = max(most, sum(r() is not None for r in live))
            return F.cross_entropy(h, b[1])

        loop(model, "torch", None, objective=objective)((x, y), (x, y)).backward()
        peak[count] = most
    assert peak[2] == peak[16]


# ---- explain -------------------------------------------------------------------------------------------------


@backends
def test_explain_names_the_backend(backend: str) -> None:
    text = str(loop(mlp(), backend).explain(data(0), data(1)))
    assert "backend" in text and ("torch" in text or "native" in text)


@backends
@pytest.mark.parametrize("name", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"])
def test_labels_of_any_integer_type(backend: str, name: str) -> None:
    model, (x, y), query = mlp(), data(0), data(1)
    loss = loop(model, backend)((x, y.to(getattr(torch, name))), query)
    close(loss, expected(model, (x, y), query).losses.mean())


LOSSES_OF_LONGS: dict[str, Any] = {  # in which PyTorch itself takes no uint8
    "smoothed": lambda o, y: F.cross_entropy(o, y, weight=torch.ones(WAYS, dtype=o.dtype), label_smoothing=0.1),
    "one_hot": lambda o, y: (o * F.one_hot(y, WAYS)).mean(),
    "many places": lambda o, y: F.cross_entropy(o[:, :, None], y[:, None]),
}


@backends
@pytest.mark.parametrize("name", LOSSES_OF_LONGS)
def test_bytes_as_labels_of_losses_that_want_longs(backend: str, name: str) -> None:
    (x, y), query, loss = data(0), data(1), LOSSES_OF_LONGS[name]
    want = loop(mlp(), "torch", loss)((x, y), query)
    inner = loop(mlp(), backend, loss)
    bytes_ = (x, y.byte()), (query[0], query[1].byte())
    close(inner(*bytes_), want)
    assert backend == "torch" or "backend: native" in inner.explain(*bytes_)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0.3, batch_first=True)
        self.head = nn.Linear(6, WAYS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x.unsqueeze(1)).squeeze(1))


@backends
def test_fused_attention_with_dropout_to_second_order(backend: str) -> None:
    """PyTorch's fused attention on the CPU has no second derivative; the reference takes the one that has."""
    model, support, query = Attending().double(), data(0), data(1)
    inner = loop(model, backend)
    value = inner(support, query)
    value.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        answer = expected(model, support, query)
    model.zero_grad()
    inner(support, query).backward()
    check_grads(model, answer)


@backends
def test_who_holds_the_loop_and_is_read_by_the_loss_can_go(backend: str) -> None:
    """A trainer whose method is the objective: the loop looks at the trainer, which holds the loop."""

    class Trainer:
        def __init__(self) -> None:
            self.scale = 2.0
            self.model = nn.Linear(2, 1)
            self.inner = metafast.InnerLoop(
                self.model, objective=self.loss, update=metafast.SGD(lr=0.1), steps=1, backend=backend
            )

        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            return self.scale * model(batch[0]).square().mean()

    trainer = Trainer()
    batch = (torch.ones(2, 3, 2), torch.ones(2, 3, 1))
    for _ in range(2):
        trainer.inner(batch, batch).backward()
    watch = weakref.ref(trainer), weakref.ref(trainer.model)
    del trainer
    gc.collect()
    assert [w() for w in watch] == [None, None]


def test_first_calls_of_two_threads_on_different_data() -> None:
    """What one call traced is not taken for another's."""
    inner = loop(mlp(), "native")
    first, second = data(0), (data(1)[0] * 10, data(1)[1])
    inner._problem(first, first, gradient=True)  # traced, as far as a thread may have come when another one calls
    close(inner.meta_gradient(second, second)[0], loop(inner.model, "torch").meta_gradient(second, second)[0])


def test_masked_log_probabilities() -> None:
    """Sums of probabilities that are zero, in a task that the check at the first use does not see."""

    def objective(model: nn.Module, batch: Any) -> Tensor:
        logits = model(batch[0]).masked_fill(batch[1] > 0, -torch.inf)
        return torch.logaddexp(logits, logits.detach()).exp().mean()

    x = data(0)[0]
    mask = torch.zeros(len(x), 1, WAYS, dtype=torch.int64)
    mask[1:, :, 1] = 1
    losses = []
    for backend in ("torch", "native"):
        inner = metafast.InnerLoop(
            mlp(), objective=objective, update=metafast.SGD(lr=0.1), steps=0, reduction="none", backend=backend
        )
        losses.append(inner((x, mask), (x, mask)).detach())
    assert losses[0].isfinite().all()
    close(losses[1], losses[0])

