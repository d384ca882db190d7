"""The contenders: metafast and, for each peer, an adapter to its own way of writing one meta-gradient.

Every contender is given the same case and is timed to its *raw gradients*: the mean query loss over tasks
and its gradient with respect to every parameter, in the module's order. What can be done once (tracing,
compiling, converting the data) is done in `prepare`; the callable that it returns is what is timed, and
returns only when the numbers are there.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import time
import types
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.architectures import composed_norm, forward
from bench.workloads import Case, Workload

Raw = tuple[Any, Sequence[Any]]  # mean loss, gradients; tensors or arrays
Call = Callable[[], Raw]

LONG = 2.0  # seconds of a call from which on one run says enough


class Peer(ABC):
    """One contender. `family` is metafast, pytorch or jax; ratios are formed by family.

    `packages` are what it imports beside torch, `install` how to get them. `compiles` marks those whose compiler
    takes minutes on some nets and can't be stopped: a process of their own tries them first (`bench.trial`).
    """

    name: str
    family: str
    compiles: bool = False
    packages: tuple[str, ...] = ()
    install: str = ""

    def missing(self) -> str | None:
        """Which of its packages are not installed and how to get them, or None if they all are."""
        absent = [package for package in self.packages if importlib.util.find_spec(package) is None]
        return f"{', '.join(absent)} not installed: {self.install}" if absent else None

    def load(self) -> None:
        """Import its packages, which `prepare` would do else."""
        for package in self.packages:
            importlib.import_module(package)

    def declines(self, w: Workload) -> str | None:
        """Why it can't compute this workload, or None."""
        return None

    @abstractmethod
    def prepare(self, case: Case) -> Call:
        """A callable that computes one meta-gradient; it may compile at its first call."""


def _scaled(total: Sequence[Tensor], tasks: int) -> list[Tensor]:
    return [g / tasks for g in total]


# ---- metafast


class Metafast(Peer):
    """metafast itself, through its public call to raw gradients. The arguments are what InnerLoop takes."""

    family = "metafast"
    packages, install = ("metafast",), "pip install -e . in the checkout"

    def __init__(self, backend: str = "auto", memory_budget: int | None = None) -> None:
        self.backend, self.memory_budget = backend, memory_budget
        self.name = "metafast" if backend == "auto" else f"metafast-{backend}"

    def loop(self, case: Case) -> nn.Module:
        """The `InnerLoop` of the workload."""
        import metafast

        w = case.workload
        which = {} if w.adapted == "*" else {"params": w.adapted}
        update = metafast.SGD(lr=w.lr)
        how = {"backend": self.backend, "memory_budget": self.memory_budget}
        return metafast.InnerLoop(
            case.module, w.loss, update=update, steps=w.steps, order=w.order, **how, **which
        )

    def prepare(self, case: Case) -> Call:
        inner, names = self.loop(case), list(case.params)

        def call() -> Raw:
            loss, gradients = inner.meta_gradient(case.support, case.query)
            return loss, [_named(gradients, name) for name in names]

        return call


def _named(gradients: Mapping[str, Tensor], name: str) -> Tensor:
    """The gradient of a parameter, whatever prefix the mapping puts before the module's own name."""
    if name in gradients:
        return gradients[name]
    ends = [key for key in gradients if key.endswith(f".{name}")]
    if len(ends) != 1:
        raise KeyError(
            f"meta-gradient of '{name}': got keys {list(gradients)}, expected the parameter's name"
        )
    return gradients[ends[0]]


# ---- PyTorch, by hand


def task_loss(
    w: Workload,
    params: Mapping[str, Tensor],
    support: Sequence[Tensor],
    query: Sequence[Tensor],
    gradient: Callable[..., Sequence[Tensor]],
) -> Tensor:
    """Query loss of one task after `steps` of SGD along `gradient(support loss, adapted)`."""
    body, head = w.parts()
    x = forward(body, params, support[0])
    fast = dict(params)
    adapted = [name for name in params if w.adapts(name)]
    for _ in range(w.steps):
        loss = w.loss(forward(head, fast, x), support[1])
        grads = gradient(loss, [fast[name] for name in adapted])
        fast.update({name: fast[name] - w.lr * g for name, g in zip(adapted, grads, strict=True)})
    return w.loss(forward(w.layers, fast, query[0]), query[1])


class Eager(Peer):
    """A loop over tasks, steps and `torch.autograd.grad`, written by hand over plain functional calls."""

    name, family = "eager", "pytorch"

    def prepare(self, case: Case) -> Call:
        w, params = case.workload, case.params

        def support_gradient(loss: Tensor, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
            return torch.autograd.grad(loss, inputs, create_graph=w.order == 2)

        def call() -> Raw:
            total, mean = [torch.zeros_like(p) for p in params.values()], torch.zeros((), dtype=w.dtype)
            for support, query in _by_task(case):
                loss = task_loss(w, params, support, query, support_gradient)
                for t, g in zip(total, torch.autograd.grad(loss, list(params.values())), strict=True):
                    t += g
                mean += loss.detach()
            return mean / w.tasks, _scaled(total, w.tasks)

        return call


def _by_task(case: Case) -> list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """(support, query) of each task."""
    pairs = zip(zip(*case.support, strict=True), zip(*case.query, strict=True), strict=True)
    return list(pairs)


# ---- torch.func


def functional_task(w: Workload) -> Callable[..., Tensor]:
    """`f(params, support, query) -> loss` of one task for torch.func."""
    body, head = w.parts()

    def loss(fast: dict, fixed: dict, features: Tensor, y: Tensor) -> Tensor:
        return w.loss(forward(head, {**fixed, **fast}, features, composed_norm), y)

    def task(params: dict, support: Sequence[Tensor], query: Sequence[Tensor]) -> Tensor:
        fast = {name: p for name, p in params.items() if w.adapts(name)}
        fixed = {name: p for name, p in params.items() if name not in fast}
        x = forward(body, fixed, support[0], composed_norm)
        for _ in range(w.steps):
            grads = torch.func.grad(loss)(fast, fixed, x, support[1])
            if w.order == 1:
                grads = {name: g.detach() for name, g in grads.items()}
            fast = {name: p - w.lr * grads[name] for name, p in fast.items()}
        return loss(fast, fixed, forward(body, fixed, query[0], composed_norm), query[1])

    return task


Mapped = Callable[[dict, Sequence[Tensor], Sequence[Tensor]], tuple[dict, Tensor]]


def map_of_gradients(w: Workload) -> Mapped:
    """`vmap(grad(task))`, then the mean over tasks."""
    mapped = torch.func.vmap(
        torch.func.grad_and_value(functional_task(w)), in_dims=(None, 0, 0), chunk_size=w.chunk
    )

    def call(params: dict, support: Sequence[Tensor], query: Sequence[Tensor]) -> tuple[dict, Tensor]:
        grads, losses = mapped(params, support, query)
        return {name: g.mean(0) for name, g in grads.items()}, losses.mean()

    return call


def gradient_of_map(w: Workload) -> Mapped:
    """`grad(mean(vmap(task)))`: the sum over tasks is left to the products; chunks are added up."""
    mapped = torch.func.vmap(functional_task(w), in_dims=(None, 0, 0))
    whole = torch.func.grad_and_value(lambda params, s, q: mapped(params, s, q).sum())
    chunk = w.chunk or w.tasks

    def call(params: dict, support: Sequence[Tensor], query: Sequence[Tensor]) -> tuple[dict, Tensor]:
        total: dict = {}
        loss = 0
        for at in range(0, w.tasks, chunk):
            part = slice(at, at + chunk)
            grads, value = whole(params, tuple(s[part] for s in support), tuple(q[part] for q in query))
            total = {name: g + total[name] for name, g in grads.items()} if total else grads
            loss = loss + value
        return {name: g / w.tasks for name, g in total.items()}, loss / w.tasks

    return call


def _over(case: Case, mapped: Mapped) -> Call:
    params = {name: p.detach() for name, p in case.params.items()}

    def call() -> Raw:
        grads, loss = mapped(params, case.support, case.query)
        return loss, list(grads.values())

    return call


class Vmap(Peer):
    """torch.func over all tasks; `vmap(grad)` and `grad(vmap)` are both tried, the faster one counts."""

    name, family = "vmap", "pytorch"
    forms: tuple[Callable[[Workload], Mapped], ...] = (map_of_gradients, gradient_of_map)

    def build(self, case: Case, form: Callable[[Workload], Mapped]) -> Call:
        """The call for one of the two forms."""
        return _over(case, form(case.workload))

    def prepare(self, case: Case) -> Call:
        return _fastest([self.build(case, form) for form in self.forms])


class Compiled(Vmap):
    """torch.compile (inductor, defaults) of the torch.func form; whole graphs only.

    Each workload starts with an empty compiler: its code objects are the same, and torch.compile would take the
    second set of shapes for dynamic ones and refuse after the eighth.
    """

    name, compiles = "compile", True

    def prepare(self, case: Case) -> Call:
        torch.compiler.reset()
        return super().prepare(case)

    def build(self, case: Case, form: Callable[[Workload], Mapped]) -> Call:
        return _over(case, torch.compile(form(case.workload), fullgraph=True))


def _fastest(calls: Sequence[Call]) -> Call:
    """The quickest of several calls that do the same: the better of two runs counts, after one that warms up."""
    if len(calls) == 1:
        return calls[0]
    seconds = []
    for call in calls:
        call()
        seconds.append(_seconds(call))
        if seconds[-1] < LONG:
            seconds[-1] = min(seconds[-1], _seconds(call))
    return calls[seconds.index(min(seconds))]


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# ---- libraries


def import_learn2learn_maml() -> types.ModuleType:
    """`learn2learn.algorithms.maml` without the package's own imports.

    learn2learn imports gym, torchvision, qpth and its own C extensions; its MAML is plain Python and needs none
    of them. So empty modules that know their folder stand in for the packages.
    """
    if "learn2learn.algorithms.maml" in sys.modules:
        return sys.modules["learn2learn.algorithms.maml"]
    spec = importlib.util.find_spec("learn2learn")
    if spec is None or spec.origin is None:
        raise ImportError("learn2learn: not installed")
    root = Path(spec.origin).parent
    for name, folder in (("learn2learn", root), ("learn2learn.algorithms", root / "algorithms")):
        empty = importlib.machinery.ModuleSpec(name, loader=None, is_package=True)
        empty.submodule_search_locations = [str(folder)]
        sys.modules.setdefault(name, importlib.util.module_from_spec(empty))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("learn2learn.algorithms.maml")


class Learn2learn(Peer):
    """learn2learn's `MAML`: clone, adapt, loss; task by task (Arnold et al. 2020)."""

    name, family = "learn2learn", "pytorch"
    packages = ("learn2learn",)
    # pip takes the C files of its archive, which were made for Python 3.7; built in its folder, Cython makes new ones.
    install = (
        "pip install cython setuptools wheel; pip download --no-deps --no-binary :all: --no-build-isolation "
        "learn2learn; unpack it; there python setup.py build_ext bdist_wheel; pip install --no-deps dist/*.whl"
    )

    def load(self) -> None:
        import_learn2learn_maml()

    def declines(self, w: Workload) -> str | None:
        return None if w.adapted == "*" else "its MAML adapts every parameter"

    def prepare(self, case: Case) -> Call:
        w = case.workload
        maml = import_learn2learn_maml().MAML(case.module, lr=w.lr, first_order=w.order == 1)

        def task(support: Sequence[Tensor], query: Sequence[Tensor]) -> Tensor:
            learner = maml.clone()
            for _ in range(w.steps):
                learner.adapt(w.loss(learner(support[0]), support[1]))
            return w.loss(learner(query[0]), query[1])

        return _task_by_task(case, task)


class Higher(Peer):
    """higher's `innerloop_ctx` around `torch.optim.SGD`, task by task (Grefenstette et al. 2019)."""

    name, family = "higher", "pytorch"
    packages, install = ("higher",), "pip install higher"

    def declines(self, w: Workload) -> str | None:
        return None if w.adapted == "*" else "its loop adapts every parameter"

    def prepare(self, case: Case) -> Call:
        import higher

        w = case.workload
        optimizer = torch.optim.SGD(case.module.parameters(), lr=w.lr)
        second = w.order == 2

        def first_order_gradients(grads: Sequence[Tensor]) -> list[Tensor]:
            return [g.detach() for g in grads]

        def task(support: Sequence[Tensor], query: Sequence[Tensor]) -> Tensor:
            with higher.innerloop_ctx(case.module, optimizer, copy_initial_weights=False) as (fast, inner):
                for _ in range(w.steps):
                    loss = w.loss(fast(support[0]), support[1])
                    inner.step(loss, grad_callback=None if second else first_order_gradients)
                return w.loss(fast(query[0]), query[1])

        return _task_by_task(case, task)


class TorchOpt(Peer):
    """TorchOpt's `MetaSGD`, the module's state taken back after each task (Ren et al. 2022)."""

    name, family = "torchopt", "pytorch"
    packages, install = ("torchopt",), "pip install torchopt"

    def declines(self, w: Workload) -> str | None:
        if w.order == 1:
            return "its MetaSGD always keeps the graph of second order"
        return None if w.adapted == "*" else "its MetaSGD adapts every parameter"

    def prepare(self, case: Case) -> Call:
        import torchopt

        w, module = case.workload, case.module
        start = torchopt.extract_state_dict(module, by="reference")

        def task(support: Sequence[Tensor], query: Sequence[Tensor]) -> Tensor:
            optimizer = torchopt.MetaSGD(module, lr=w.lr)
            try:
                for _ in range(w.steps):
                    optimizer.step(w.loss(module(support[0]), support[1]))
                return w.loss(module(query[0]), query[1])
            finally:
                torchopt.recover_state_dict(module, start)

        return _task_by_task(case, task)


def _task_by_task(case: Case, task: Callable[..., Tensor]) -> Call:
    """Mean loss and gradients of a library that builds the graph of one task at a time."""
    params, tasks = list(case.module.parameters()), case.workload.tasks

    def call() -> Raw:
        total, mean = [torch.zeros_like(p) for p in params], torch.zeros((), dtype=case.workload.dtype)
        for support, query in _by_task(case):
            loss = task(support, query)
            for t, g in zip(total, torch.autograd.grad(loss, params), strict=True):
                t += g
            mean += loss.detach()
        return mean / tasks, _scaled(total, tasks)

    return call


def all_peers() -> dict[str, Peer]:
    """Every contender by name, those that can't run here included; metafast first."""
    from bench.jax_peers import JaxScan, JaxVmap

    peers: list[Peer] = [
        Metafast(),
        Eager(),
        Vmap(),
        Compiled(),
        Learn2learn(),
        Higher(),
        TorchOpt(),
        JaxVmap(),
        JaxScan(),
    ]
    extra: list[Peer] = [Metafast("native"), Metafast("torch")]
    return {peer.name: peer for peer in (*peers, *extra)}


DEFAULT = ("metafast", "eager", "vmap", "compile", "learn2learn", "higher", "torchopt", "jax-vmap", "jax-scan")
QUICK = ("metafast", "eager", "vmap")
