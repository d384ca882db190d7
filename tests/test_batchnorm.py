"""Running statistics end as the eager loop over the tasks in order would leave them; a replay leaves them alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loops import LR, TASKS, WAYS, backends, close, data, expected, loop
from torch import Tensor, nn

import metafast
from metafast.batchnorm import fold, tracked

pytestmark = pytest.mark.filterwarnings("ignore::metafast.FallbackWarning")

momenta = pytest.mark.parametrize("momentum", [0.1, 1.0, None])


def net(momentum: float | None = 0.1, **options: Any) -> nn.Sequential:
    torch.manual_seed(7)
    norm = nn.BatchNorm1d(8, momentum=momentum, **options)
    model = nn.Sequential(nn.Linear(6, 8), norm, nn.Tanh(), nn.Linear(8, WAYS)).double()
    with torch.no_grad():
        if model[1].running_mean is not None:
            model[1].running_mean.normal_()
            model[1].running_var.uniform_(0.5, 2.0)
    return model


def same_buffers(model: nn.Module, want: dict[str, Tensor]) -> None:
    for name, buffer in model.named_buffers():
        close(buffer.double(), want[name].double())


@backends
@momenta
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("steps", [0, 2])
def test_the_fused_call_folds_once(backend: str, momentum: float | None, reduction: str, steps: int) -> None:
    model, support, query = net(momentum), data(0), data(1, 7)
    answer = expected(model, support, query, steps=steps)
    loss = loop(model, backend, steps=steps, reduction=reduction)(support, query).mean()
    same_buffers(model, answer.buffers)
    assert int(model[1].num_batches_tracked) == TASKS * (steps + 1)
    loss.backward()
    same_buffers(model, answer.buffers)  # also where backward replays
    close(loss, answer.losses.mean())
    for name, parameter in model.named_parameters():
        close(parameter.grad, answer.params[name])


@backends
@momenta
def test_no_grad_meta_gradient_and_a_second_call_fold_too(backend: str, momentum: float | None) -> None:
    model, support, query = net(momentum), data(0), data(1)
    inner = loop(model, backend)
    first = expected(model, support, query)
    with torch.no_grad():
        inner(support, query)
    same_buffers(model, first.buffers)
    second = expected(model, support, query)
    inner.meta_gradient(support, query)
    same_buffers(model, second.buffers)


@backends
@momenta
def test_adapt_folds_its_own_passes_and_fast_weights_theirs(backend: str, momentum: float | None) -> None:
    model, support, query = net(momentum), data(0), data(1)
    reference = copy.deepcopy(model)
    fast = loop(model, backend).adapt(support)
    assert int(model[1].num_batches_tracked) == 2 * TASKS

    for t in range(TASKS):
        phi = dict(reference.named_parameters())
        for _ in range(2):
            loss = F.cross_entropy(torch.func.functional_call(reference, phi, (support[0][t],)), support[1][t])
            grads = torch.autograd.grad(loss, list(phi.values()))
            phi = {n: (p - LR * g).detach().requires_grad_() for (n, p), g in zip(phi.items(), grads, strict=True)}
    same_buffers(model, dict(reference.named_buffers()))

    logits = fast(query[0])
    for t in range(TASKS):
        torch.func.functional_call(reference, fast.task(t), (query[0][t],))
    same_buffers(model, dict(reference.named_buffers()))
    after = copy.deepcopy(dict(model.named_buffers()))
    F.cross_entropy(logits.flatten(0, 1), query[1].flatten()).backward()
    same_buffers(model, after)


@backends
@momenta
def test_an_adapt_without_steps_makes_no_pass(backend: str, momentum: float | None) -> None:
    model, support = net(momentum), data(0)
    before = copy.deepcopy(dict(model.named_buffers()))
    loop(model, backend, steps=0).adapt(support)
    same_buffers(model, before)


@backends
def test_eval_mode_reads_the_running_statistics_and_leaves_them(backend: str) -> None:
    model, support, query = net().eval(), data(0), data(1)
    before = copy.deepcopy(dict(model.named_buffers()))
    answer = expected(model, support, query)
    loss = loop(model, backend, reduction="none")(support, query)
    loss.mean().backward()
    close(loss, answer.losses)
    for name, parameter in model.named_parameters():
        close(parameter.grad, answer.params[name])
    same_buffers(model, before)


@backends
def test_a_replay_reads_the_statistics_of_the_first_pass(backend: str) -> None:
    model, support, query = net().eval(), data(0), data(1)
    answer = expected(model, support, query)
    loss = loop(model, backend, reduction="none")(support, query)
    with torch.no_grad():
        model[1].running_mean.add_(5.0)
    loss.mean().backward()
    for name, parameter in model.named_parameters():
        close(parameter.grad, answer.params[name])


@backends
def test_train_and_eval_in_turn(backend: str) -> None:
    model, support, query = net(), data(0), data(1)
    inner = loop(model, backend)
    for train in (True, False, True):
        model.train(train)
        answer = expected(model, support, query)
        close(inner(support, query), answer.losses.mean())
        same_buffers(model, answer.buffers)
    model[1].eval()  # one layer alone
    answer = expected(model, support, query)
    close(inner(support, query), answer.losses.mean())
    same_buffers(model, answer.buffers)


def check(model: nn.Module, backend: str, query_objective: Any = None) -> None:
    """Loss, running statistics and gradients are those of the eager loop."""
    support, query = data(0), data(1)
    answer = expected(model, support, query, query_objective=query_objective)
    inner = loop(model, backend, query_objective=query_objective)
    loss = inner(support, query)
    loss.backward()
    close(loss, answer.losses.mean())
    same_buffers(model, answer.buffers)
    for name, parameter in model.named_parameters():
        close(parameter.grad, answer.params[name])


@backends
@pytest.mark.parametrize("options", [{"track_running_stats": False}, {"affine": False}])
def test_without_tracking_or_affine(backend: str, options: dict[str, bool]) -> None:
    check(net(**options), backend)


class Reading(nn.Module):
    """Reads a running statistic before its layer moves it, or after."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.body, self.norm, self.head, self.before = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, WAYS), before

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        scale = self.norm.running_var.clone()
        x = self.norm(x)
        return self.head(x * (scale if self.before else self.norm.running_var.clone()))


def in_evaluation(model: nn.Module, batch: Any) -> Tensor:
    model.eval()
    loss = F.cross_entropy(model(batch[0]), batch[1])
    model.train()
    return loss


def read_alone(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model[3](model[0](batch[0]) + model[1].running_mean), batch[1])


@backends
@momenta
@pytest.mark.parametrize("query_objective", [in_evaluation, read_alone])
def test_the_query_reads_what_the_support_moved(backend: str, momentum: float | None, query_objective: Any) -> None:
    check(net(momentum), backend, query_objective)


@backends
@pytest.mark.parametrize("before", [False, True])
def test_statistics_are_read_where_they_move(backend: str, before: bool) -> None:
    check(Reading(before).double(), backend)


class Warming(nn.Module):
    """Reads how many batches its layer has seen, as a number or as a tensor."""

    def __init__(self, steers: bool) -> None:
        super().__init__()
        self.norm, self.head, self.steers = nn.BatchNorm1d(6), nn.Linear(6, WAYS), steers

    def forward(self, x: Tensor) -> Tensor:
        x, seen = self.norm(x), self.norm.num_batches_tracked
        if self.steers:
            return self.head(x if seen == 3 else 2 * x)
        return self.head(x / (1 + seen))


@backends
@pytest.mark.parametrize("steers", [False, True])
def test_the_counter_of_batches_is_read_where_it_moves(backend: str, steers: bool) -> None:
    check(Warming(steers).double(), backend)


def test_a_buffer_that_moves_and_is_read_is_named() -> None:
    inner = loop(net(), "auto", query_objective=in_evaluation)
    assert "1.running_mean, which BatchNorm updates in the same call" in inner.explain(data(0), data(1))


class Counting(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.2)


@backends
@pytest.mark.parametrize("layer", [nn.SyncBatchNorm, Counting])
def test_layers_that_insist_on_their_counter(backend: str, layer: Callable[[int], nn.Module]) -> None:
    check(nn.Sequential(nn.Linear(6, 7), layer(7), nn.Linear(7, WAYS)).double(), backend)


class Functional(nn.BatchNorm1d):
    """Moves its statistics by another momentum, and counts no batch."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, True, 0.2)


class Uncounted(nn.Module):
    """Another module moves the statistics of a layer that does not run, by that layer's momentum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, True, norm.momentum)


class Shared(nn.Sequential):
    """Two layers of different momenta with the same statistics."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.BatchNorm1d(width), nn.BatchNorm1d(width, momentum=0.5))
        self.double()  # which would untie them
        self[1].running_mean, self[1].running_var = self[0].running_mean, self[0].running_var


@backends
@pytest.mark.parametrize("layer", [Functional, Uncounted, Shared])
def test_statistics_that_move_otherwise_than_their_layer_does(backend: str, layer: Callable[[int], nn.Module]) -> None:
    model = nn.Sequential(nn.Linear(6, 7), layer(7), nn.Linear(7, WAYS)).double()
    assert backend == "torch" or "statistics otherwise than" in loop(model, "auto").explain(data(0), data(1))
    check(model, backend)


@backends
def test_a_layer_alone(backend: str) -> None:
    model = nn.BatchNorm1d(6).double()
    assert backend == "torch" or "backend: native" in loop(model, "auto").explain(data(0), data(1))
    check(model, backend)


class Twice(nn.Module):
    """One layer called twice in a pass, and a buffer that a module writes on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.BatchNorm1d(6), nn.Linear(6, WAYS)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))
        self.register_buffer("level", torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        self.level = 0.5 * self.level + x.detach().abs().mean(0)  # a new tensor under the old name
        return self.head(self.norm(torch.tanh(self.norm(x)) / self.level))


@backends
def test_a_layer_used_twice_and_buffers_written_by_the_model(backend: str) -> None:
    torch.manual_seed(8)
    model, support, query = Twice().double(), data(0), data(1)
    reference = copy.deepcopy(model)
    inner = loop(model, backend)
    inner(support, query)
    theta = dict(reference.named_parameters())
    for t in range(TASKS):
        phi = theta
        for _ in range(2):
            loss = F.cross_entropy(torch.func.functional_call(reference, phi, (support[0][t],)), support[1][t])
            grads = torch.autograd.grad(loss, list(phi.values()))
            phi = {n: (p - LR * g).detach().requires_grad_() for (n, p), g in zip(phi.items(), grads, strict=True)}
        torch.func.functional_call(reference, phi, (query[0][t],))
    assert int(model.passes) == 3 * TASKS
    close(model.norm.running_mean, reference.norm.running_mean)
    close(model.norm.running_var, reference.norm.running_var)


@backends
@momenta
def test_a_layer_outside_the_model_makes_the_passes_of_the_loop(backend: str, momentum: float | None) -> None:
    teacher, support, query = net(momentum), data(0), data(1)
    reference = copy.deepcopy(teacher)
    inner = metafast.InnerLoop(
        nn.Linear(6, WAYS).double(),
        objective=lambda m, b: F.mse_loss(m(b[0]), teacher(b[0])),
        update=metafast.SGD(LR),
        steps=2,
        backend=backend,
    )
    for _ in range(2):
        inner.meta_gradient(support, query)
        for t in range(TASKS):
            for x in (support[0], support[0], query[0]):
                reference(x[t])
        same_buffers(teacher, dict(reference.named_buffers()))


@backends
@pytest.mark.filterwarnings("ignore::metafast.FallbackWarning")
@pytest.mark.parametrize("way", ["none", "adapt"])
def test_a_replay_leaves_the_statistics_of_a_layer_outside_the_model(backend: str, way: str) -> None:
    teacher, support, query = net(0.1), data(0), data(1)
    inner = metafast.InnerLoop(
        nn.Linear(6, WAYS).double(),
        objective=lambda m, b: F.mse_loss(m(b[0]), teacher(b[0])),
        update=metafast.SGD(LR),
        steps=2,
        reduction="none",
        backend=backend,
    )
    out = inner(support, query) if way == "none" else inner.adapt(support)["weight"]
    before = copy.deepcopy(dict(teacher.named_buffers()))
    out.sum().backward()
    same_buffers(teacher, before)


@backends
def test_an_error_leaves_the_statistics(backend: str) -> None:
    model, support = net(), data(0)
    before = copy.deepcopy(dict(model.named_buffers()))
    labels = data(1)[1].clone()
    labels[TASKS - 1] = WAYS  # the last task's query fails, after all other passes
    with pytest.raises(ValueError, match="task 2"):
        loop(model, backend)(support, (data(1)[0], labels))
    same_buffers(model, before)


@backends
def test_nonfinite_raise_leaves_the_statistics(backend: str) -> None:
    model, (x, y) = net(), data(0)
    before = copy.deepcopy(dict(model.named_buffers()))
    x[1] = float("nan")
    with pytest.raises(ArithmeticError, match="task 1"):
        loop(model, backend, nonfinite="raise")((x, y), data(1))
    same_buffers(model, before)


@momenta
def test_fold_is_the_layers_own_recurrence(momentum: float | None) -> None:
    torch.manual_seed(0)
    layer, want = (nn.BatchNorm1d(3, momentum=momentum).double() for _ in range(2))
    for passes in (1, 4):
        x = torch.randn(passes, 5, 3, dtype=torch.float64)
        for batch in x:
            want(batch)
        fold(layer, x.mean(1), x.var(1, unbiased=True))
        same_buffers(layer, dict(want.named_buffers()))


def test_what_fold_keeps_of_a_large_value_is_exact() -> None:
    layer = nn.BatchNorm1d(1, momentum=0.7).double()
    layer.running_mean.fill_(1e18)
    fold(layer, torch.zeros(24, 1, dtype=torch.float64), torch.ones(24, 1, dtype=torch.float64))
    assert float(layer.running_mean) == pytest.approx(1e18 * 0.3**24, rel=1e-13)


def test_tracked() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3))
    model[2].eval()
    assert list(tracked(model)) == ["0"]
