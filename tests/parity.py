"""How a result is obtained from metafast and how it is compared: shared by the tests of gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from zoo import LR, Entry, Task

import metafast

BACKENDS = ["torch", "native"]
WAYS_OUT = ["fused", "adapt"]
EXACT = 1e-9

Gradients = dict[str, Tensor]


def require(backend: str) -> str:
    """The backend, or a skip where it is not built."""
    if backend == "native":
        pytest.importorskip("metafast._C", reason="the native backend is not built", exc_type=ImportError)
    return backend


def inner_loop(
    task: Task, backend: str, update: metafast.UpdateRule | None = None, **options: Any
) -> metafast.InnerLoop:
    """The InnerLoop of a task of the zoo, with a learned rate unless `update` says otherwise."""
    dtype = next(task.model.parameters()).dtype
    rule = update if update is not None else metafast.SGD(lr=nn.Parameter(torch.tensor(LR, dtype=dtype)))
    if task.objective is not None:
        options["objective"] = task.objective
    if task.params is not None:
        options["params"] = task.params
    arguments = (task.model,) if task.loss is None else (task.model, task.loss)
    return metafast.InnerLoop(*arguments, update=rule, backend=backend, **options)


class _Frame(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, objective: Callable[..., Tensor], batch: Any) -> Tensor:
        return objective(self.model, batch)


def outer_loss(
    task: Task, fast: Mapping[str, Tensor], objective: Callable[..., Tensor] | None = None
) -> Tensor:
    """The mean query loss as a user writes it over fast weights, in plain PyTorch."""
    frame, minimised = _Frame(task.model), objective or task.minimised()
    count = len(pytree.tree_leaves(task.query)[0])
    losses = []
    for t in range(count):
        batch = pytree.tree_map(lambda x, t=t: x[t], task.query)
        values = {f"model.{n}": fast[n][t] for n in fast}
        losses.append(functional_call(frame, values, (minimised, batch)))
    return torch.stack(losses).mean()


def metafast_gradients(inner: metafast.InnerLoop, task: Task, way: str) -> tuple[Tensor, Gradients]:
    """Loss and gradients of everything that gets one, by one of the two ways out."""
    if way == "fused":
        loss = inner(task.support, task.query)
    else:
        loss = outer_loss(task, inner.adapt(task.support))
    loss.backward()
    return loss.detach(), collected(inner, task)


def collected(inner: metafast.InnerLoop, task: Task) -> Gradients:
    """The `.grad` of parameters, learned hyper-parameters and externs: zeros where nothing arrived."""

    def grad(t: Tensor) -> Tensor:
        return torch.zeros_like(t) if t.grad is None else t.grad

    model = {id(p) for p in task.model.parameters()}
    found = {n: grad(p) for n, p in task.model.named_parameters()}
    learned = [p for p in inner.parameters() if id(p) not in model]
    found |= {f"hyper {i}": grad(p) for i, p in enumerate(learned)}
    return found | {f"extern {i}": grad(t) for i, t in enumerate(task.externs)}


def answer(task: Task, order: int, steps: int, **options: Any) -> oracle.Answer:
    """What the eager loop says about a task of the zoo."""
    dtype = next(task.model.parameters()).dtype
    return oracle.meta_gradient(
        task.model,
        task.minimised(),
        task.support,
        task.query,
        hyper=options.pop("hyper", {"lr": torch.tensor(LR, dtype=dtype)}),
        steps=steps,
        order=order,
        adapted=task.adapted(),
        externs=task.externs,
        **options,
    )


def named(a: oracle.Answer) -> Gradients:
    """The oracle's gradients under the names of `collected`."""
    found = dict(a.params)
    found |= {f"hyper {i}": g for i, g in enumerate(a.hyper.values())}
    return found | {f"extern {i}": g for i, g in enumerate(a.externs)}


@functools.cache
def exact_answer(entry: Entry, order: int, steps: int, dtype: torch.dtype, rounded: bool) -> oracle.Answer:
    """The oracle's answer for an entry, computed once a process."""
    return answer(entry.make(dtype, rounded=rounded), order, steps)


def vector(gradients: Gradients) -> Tensor:
    """All gradients as one float64 vector."""
    return torch.cat([g.detach().double().flatten() for g in gradients.values()])


def relative_error(got: Gradients, expected: Gradients) -> float:
    """The L2 norm of the difference of the whole vectors, relative."""
    exact = vector(expected)
    return float((vector(got) - exact).norm() / exact.norm())


def assert_same(got: Gradients, expected: Gradients, bound: float = EXACT) -> None:
    """Equal as values and as a vector: each array to `bound` of its largest entry, the whole as a vector.

    An array far below the rest (the bias before a BatchNorm: 0) is measured on 1e-4 of the whole's norm.
    """
    assert list(got) == list(expected)
    exact, whole = vector(expected), vector(got)
    norm = float(exact.norm())
    for name, e in expected.items():
        assert got[name].shape == e.shape, name
        error = float((got[name].double() - e.double()).abs().max()) if e.numel() else 0.0
        scale = max(float(e.abs().max()) if e.numel() else 0.0, 1e-4 * norm)
        assert error <= bound * scale, f"{name}: off by {error:.2e} on {scale:.2e}"
    assert float((whole - exact).norm()) <= bound * norm
    if norm:
        assert 1.0 - float(whole @ exact) / (float(whole.norm()) * norm) <= bound**2 + 1e-14


# ---- float32 ------------------------------------------------------------------------------------------

DRAWS = 3  # of the numbers, to measure an error by: one draw of rounding errors may by luck be near 0


def errors(answers: list[Gradients], exact: list[Gradients]) -> float:
    """The root mean square over draws of the relative errors."""
    squares = [relative_error(a, e) ** 2 for a, e in zip(answers, exact, strict=True)]
    return math.sqrt(sum(squares) / len(squares))


@functools.cache
def eager_draws(entry: Entry, order: int, steps: int, dtype: torch.dtype) -> list[Gradients]:
    """The eager loop's gradients for each draw, in that precision, from numbers that float32 holds."""
    return [named(answer(task, order, steps)) for task in draws(entry, dtype)]


def draws(entry: Entry, dtype: torch.dtype) -> Iterator[Task]:
    """The same task with its parameters and real data moved by a thousandth, each time otherwise."""
    task = entry.make(dtype, rounded=True)
    data = [t for t in pytree.tree_leaves((task.support, task.query)) if t.is_floating_point()]
    moving = [p.data for p in task.model.parameters()] + data
    start = [t.clone() for t in (*moving, *task.model.buffers())]
    for k in range(DRAWS):
        g = torch.Generator().manual_seed(k)
        for t, before in zip((*moving, *task.model.buffers()), start, strict=True):
            t.copy_(before)
        for t in moving:
            factor = (1.0 + 1e-3 * torch.randn(t.shape, generator=g, dtype=torch.float64)).float()
            t.copy_(t.float() * factor)
        yield task


def assert_float32(entry: Entry, order: int, steps: int, way: str) -> None:
    """Within 4 times the error of PyTorch's own float32, both against float64 from the same numbers.

    At a kink two right answers can differ by more than rounding: no pre-activation of these nets lies so near one.
    """
    require("native")
    got, inner = [], None
    for task in draws(entry, torch.float32):
        inner = inner or inner_loop(task, "native", steps=steps, order=order)
        for t in (*inner.parameters(), *task.externs):
            t.grad = None
        found = metafast_gradients(inner, task, way)[1]
        assert all(g.dtype == torch.float32 for g in found.values())
        got.append({n: g.clone() for n, g in found.items()})
    exact = eager_draws(entry, order, steps, torch.float64)
    assert errors(got, exact) <= 4.0 * errors(eager_draws(entry, order, steps, torch.float32), exact)
