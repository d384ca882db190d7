"""What must not change a result: threads, repetition, processes, layouts, label types, small batches."""

from __future__ import annotations

import copy
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from parity import (
    BACKENDS,
    WAYS_OUT,
    answer,
    assert_same,
    collected,
    inner_loop,
    metafast_gradients,
    named,
    require,
    vector,
)
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset
from zoo import Task, conv4
from zoo import named as entry_named

import metafast

BACKEND = pytest.mark.parametrize("backend", BACKENDS)
WAY = pytest.mark.parametrize("way", WAYS_OUT)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bits(name: str, backend: str, way: str, tasks: int = 3) -> bytes:
    """Loss and gradients of a fresh model, as bytes; float32, 3 steps, order 2."""
    task = entry_named(name).make(torch.float32)
    task.support, task.query = pytree.tree_map(lambda t: _repeat(t, tasks), (task.support, task.query))
    inner = inner_loop(task, backend, steps=3)
    loss = inner(task.support, task.query) if way == "fused" else _sum_of_squares(inner, task)
    loss.backward()
    return torch.cat([loss.detach().double().reshape(1), vector(collected(inner, task))]).numpy().tobytes()


def _repeat(t: Tensor, tasks: int) -> Tensor:
    return torch.cat([t] * -(-tasks // len(t)))[:tasks]


def _sum_of_squares(inner: metafast.InnerLoop, task: Task) -> Tensor:
    return torch.stack([(f * f).sum() for f in inner.adapt(task.support).values()]).sum()


MODELS = pytest.mark.parametrize("name", ["mlp_relu", "conv4_max_pool", "large_images", "anil", "attention"])


# ---- the same bits -----------------------------------------------------------------------------------


@MODELS
@WAY
@pytest.mark.parametrize("tasks", [1, 3, 19])
def test_same_bits_on_any_number_of_threads(name: str, way: str, tasks: int) -> None:
    """1 task splits instructions over threads, 3 leave some idle, 19 are more than the 16 partial sums."""
    require("native")
    found = []
    for count in (1, 2, 4):
        with torch_threads(count):
            found.append(bits(name, "native", way, tasks))
    assert found[0] == found[1] == found[2]


@MODELS
@WAY
def test_same_bits_twice_in_a_row(name: str, way: str) -> None:
    require("native")
    task = entry_named(name).make(torch.float32)
    task.model.eval()  # no running statistics move between the calls
    inner = inner_loop(task, "native", steps=3)
    found = []
    for _ in range(2):
        for p in inner.parameters():
            p.grad = None
        _, gradients = metafast_gradients(inner, task, way)
        found.append(vector(gradients))
    assert torch.equal(found[0], found[1])


@WAY
@BACKEND
def test_a_call_on_one_thread_leaves_the_setting_alone(way: str, backend: str) -> None:
    with torch_threads(1):
        one = bits("mlp_gelu", require(backend), way)
        assert torch.get_num_threads() == 1
    with torch_threads(2):
        assert backend == "torch" or bits("mlp_gelu", backend, way) == one
        assert torch.get_num_threads() == 2


# ---- processes and threads -----------------------------------------------------------------------------


class _Losses(Dataset[Tensor]):
    """Every item is a call of the inner loop, made in whichever process asks for it."""

    def __init__(self, name: str, backend: str) -> None:
        self.task = entry_named(name).make()
        self.inner = inner_loop(self.task, backend, steps=2)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        loss, gradients = self.inner.meta_gradient(self.task.support, self.task.query)
        return torch.cat([loss.reshape(1), vector(gradients)])


@BACKEND
@pytest.mark.parametrize("name", ["mlp_gelu", "conv4_eval"])
@pytest.mark.filterwarnings("ignore:os.fork.*multithreaded")  # what else is loaded may say so
def test_forked_workers(name: str, backend: str) -> None:
    """A worker forked after the parent used its threads gets the parent's numbers; the parent goes on."""
    data = _Losses(name, require(backend))
    with torch_threads(2 if backend == "native" else 1):
        before = data[0]
        loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
        rows = list(loader)
        after = data[0]
    torch.testing.assert_close(torch.stack([*rows, after]), before.expand(5, -1), rtol=1e-12, atol=1e-14)
    if backend == "native":
        assert all(torch.equal(row, before) for row in [*rows, after])


@BACKEND
@pytest.mark.parametrize("shared", [True, False], ids=["one_inner_loop", "one_each"])
def test_two_python_threads_at_once(backend: str, shared: bool) -> None:
    require(backend)
    with torch_threads(2 if backend == "native" else 1):
        data = [_Losses(name, backend) for name in ("mlp_gelu", "conv4_eval")]
        expected = [d[0] for d in data]
        if shared:
            data[1], expected[1] = data[0], expected[0]
        wrong: list[Any] = []

        def work(which: int) -> None:
            try:
                for _ in range(20):
                    got = data[which][0]
                    if not torch.allclose(got, expected[which], rtol=1e-12, atol=1e-14):
                        wrong.append((which, (got - expected[which]).abs().max()))
            except Exception as error:
                wrong.append(error)

        workers = [threading.Thread(target=work, args=(which,)) for which in range(2)]
        for w in workers:
            w.start()
        for w in workers:
            w.join(60)
    assert not any(w.is_alive() for w in workers)
    assert not wrong


# ---- layouts -----------------------------------------------------------------------------------------


def every_other(t: Tensor) -> Tensor:
    wide = torch.empty(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype)
    return wide[..., ::2].copy_(t)


def tasks_last(t: Tensor) -> Tensor:
    return t.movedim(0, -1).contiguous().movedim(-1, 0)


def channels_last(t: Tensor) -> Tensor:
    if t.dim() != 5:
        return t
    return t.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)


def offset(t: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(t[:1]), t])[1:]


LAYOUTS = pytest.mark.parametrize("layout", [every_other, tasks_last, channels_last, offset])


@BACKEND
@WAY
@LAYOUTS
@pytest.mark.parametrize("name", ["mlp_gelu", "strided_conv", "attention"])
def test_layouts_of_the_batch(name: str, layout: Callable[[Tensor], Tensor], way: str, backend: str) -> None:
    task = entry_named(name).make()
    task.support, task.query = pytree.tree_map(layout, (task.support, task.query))
    _, got = metafast_gradients(inner_loop(task, require(backend), steps=2), task, way)
    assert_same(got, named(answer(entry_named(name).make(), 2, 2)))


@BACKEND
@WAY
def test_expanded_batches(way: str, backend: str) -> None:
    """All tasks read one array, with stride 0."""
    task = entry_named("mlp_gelu").make()
    task.support, task.query = pytree.tree_map(
        lambda t: t[:1].expand(4, *t.shape[1:]), (task.support, task.query)
    )
    _, got = metafast_gradients(inner_loop(task, require(backend), steps=2), task, way)
    single = entry_named("mlp_gelu").make()
    single.support, single.query = pytree.tree_map(lambda t: t[:1], (single.support, single.query))
    assert_same(got, named(answer(single, 2, 2)))


@BACKEND
@WAY
def test_layouts_of_parameters(way: str, backend: str) -> None:
    """Parameters in channels-last order, and as transposed views."""
    task = entry_named("strided_conv").make()
    task.model.to(memory_format=torch.channels_last)
    last = task.model[-1]
    last.weight = nn.Parameter(last.weight.detach().t().contiguous().t())
    assert not last.weight.is_contiguous() and not task.model[0].weight.is_contiguous()
    _, got = metafast_gradients(inner_loop(task, require(backend), steps=2), task, way)
    assert_same(got, named(answer(entry_named("strided_conv").make(), 2, 2)))


@BACKEND
@WAY
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8], ids=str)
def test_label_types(dtype: torch.dtype, way: str, backend: str) -> None:
    """Labels of any integer type: PyTorch's own cross_entropy takes int64 and uint8 only."""
    task = entry_named("mlp_gelu").make()
    task.support = (task.support[0], task.support[1].to(dtype))
    if way == "fused":  # after adapt the query loss is the caller's, in PyTorch
        task.query = (task.query[0], task.query[1].to(dtype))
    _, got = metafast_gradients(inner_loop(task, require(backend), steps=2), task, way)
    assert_same(got, named(answer(entry_named("mlp_gelu").make(), 2, 2)))


# ---- the smallest batches ------------------------------------------------------------------------------


def images(tasks: int, ways: int, shots: int, queries: int) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(tasks + 10 * ways + 100 * shots)

    def batch(n: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(tasks, ways * n, 1, 16, 16, generator=draw, dtype=torch.float64)
        return x, torch.arange(ways).repeat(tasks, n)

    return {"support": batch(shots), "query": batch(queries)}


@BACKEND
@WAY
@pytest.mark.parametrize(
    ("tasks", "ways", "shots", "queries"),
    [(1, 3, 2, 2), (1, 3, 1, 1), (4, 3, 1, 2), (2, 1, 2, 1), (1, 1, 1, 1), (17, 2, 1, 1)],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_small_batches(
    tasks: int, ways: int, shots: int, queries: int, training: bool, way: str, backend: str
) -> None:
    """One task, one shot, one way, one query, more tasks than partial sums."""
    torch.manual_seed(0)
    model = conv4().double().train(training)
    task = Task(model, **images(tasks, ways, shots, queries), loss=F.cross_entropy)
    inner = inner_loop(task, require(backend), steps=2)
    expected = named(answer(copy.deepcopy(task), 2, 2))
    _, got = metafast_gradients(inner, task, way)
    assert_same(got, expected)


# ---- signals -----------------------------------------------------------------------------------------


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Ctrl-C interrupts, also in a process started to ignore it, as a shell starts what runs in its background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_ctrl_c_ends_a_long_call() -> None:
    """It would take minutes; the interrupt comes out of it, and the next call is right."""
    require("native")
    model = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 1))
    x, y = torch.randn(16, 64, 256), torch.randn(16, 64, 1)
    inner = metafast.InnerLoop(model, F.mse_loss, update=metafast.SGD(lr=1e-4), steps=1, backend="native")
    before = inner((x, y), (x, y)).item()
    inner.steps = 200_000
    with torch.no_grad():
        timer = threading.Timer(0.3, signal.raise_signal, [signal.SIGINT])
        timer.start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            inner((x, y), (x, y))
    assert time.monotonic() - start < 30
    inner.steps = 1
    assert inner((x, y), (x, y)).item() == before
