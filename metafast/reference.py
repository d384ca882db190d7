"""The eager backend: PyTorch's own autograd, task by task. It is the oracle of the others, and their fallback.

One task's graph lives at a time, so memory does not grow with the number of tasks. Nothing here knows the Graph of the
native pipeline, and nothing native is imported.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from . import tasks
from .batchnorm import Buffers, unmoved
from .checkpoints import no_checkpoints, own_graphs
from .errors import InputError, InputTypeError, LabelError, MetafastError, TaskError, message, position
from .generators import Draws
from .problem import Objective, Outcome, Problem, hyper_tree
from .transforms import eagerly

__all__ = ["Reference", "TaskError", "located", "swapping"]

Params = dict[str, Tensor]

# Parameters are swapped on the user's module while it runs, so one call runs at a time.
swapping = threading.RLock()


class Reference:
    """Computes a problem with `torch.func.functional_call` and `torch.autograd.grad`, one task after the other."""

    name = "torch"

    def losses(self, problem: Problem, *, fold: bool) -> Outcome:
        """See `Backend.losses`."""
        with _Replay(problem, differentiate=False, fold=fold) as replay:
            return replay.outcome([replay.task(t) for t in range(problem.tasks)])

    def meta_gradient(
        self,
        problem: Problem,
        weights: Tensor,
        output_cotangents: Sequence[Tensor | None] | None = None,
        *,
        fold: bool,
    ) -> Outcome:
        """See `Backend.meta_gradient`."""
        with _Replay(problem, differentiate=True, fold=fold) as replay:
            passed = []
            for t in range(problem.tasks):
                task = replay.task(t)
                pairs = [(task.loss, weights[t])]
                if output_cotangents is not None:
                    outputs = pytree.tree_leaves(task.outputs)
                    pairs += [(out, c[t]) for out, c in zip(outputs, output_cotangents, strict=True) if c is not None]
                with located(f"task {t}, meta-gradient", task.query):
                    replay.accumulate(task, pairs)
                passed.append(task.without_graph())
            outcome = replay.outcome(passed)
            outcome.gradients = replay.gradients()
            return outcome

    def adapt(self, problem: Problem, *, fold: bool) -> Outcome:
        """See `Backend.adapt`."""
        with _Replay(problem, differentiate=False, fold=fold) as replay:
            passed = [replay.inner(t) for t in range(problem.tasks)]
            fast = {name: torch.stack([task.params[name] for task in passed]) for name in problem.adapted}
            return Outcome(fast=fast, step_losses=replay.step_losses(passed), draws=replay.draws)

    def adapt_vjp(self, problem: Problem, cotangents: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """See `Backend.adapt_vjp`."""
        with _Replay(problem, differentiate=True, fold=False) as replay:
            for t in range(problem.tasks):
                task = replay.inner(t)
                with located(f"task {t}, meta-gradient", task.support):
                    replay.accumulate(task, [(task.params[name], c[t]) for name, c in cotangents.items()])
            return replay.gradients()


class _Frame(nn.Module):
    """Gives `functional_call` a forward that runs an objective on the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, objective: Objective, batch: Any) -> Any:
        return objective(self.model, batch)


class _Task:
    """One task on its way: its adapted parameters, its own leaves, its losses."""

    def __init__(self, index: int, params: Params, support: list[Tensor], query: list[Tensor]) -> None:
        self.index = index
        self.params = params
        self.support = support
        self.query = query
        self.step_losses: list[Tensor] = []
        self.loss: Tensor
        self.outputs: Any = None

    def without_graph(self) -> _Task:
        """Keep the values, let go of the graph."""
        self.params = {}
        self.loss = self.loss.detach()
        self.outputs = pytree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, self.outputs)
        return self


class _Replay:
    """Runs the tasks of one problem; as a context it holds the model, and folds buffers on the way out."""

    def __init__(self, problem: Problem, *, differentiate: bool, fold: bool) -> None:
        self.problem = problem
        self.differentiate = differentiate
        self.second_order = differentiate and problem.order == 2
        self.fold = fold
        self.wanted = frozenset(problem.wrt) if differentiate else frozenset()
        self.sums: dict[str, Tensor] = {}
        self.per_task: dict[str, list[Tensor | None]] = {}

    def __enter__(self) -> _Replay:
        with contextlib.ExitStack() as stack:
            stack.enter_context(swapping)
            stack.enter_context(no_checkpoints())
            stack.enter_context(own_graphs())
            stack.enter_context(eagerly())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.set_grad_enabled(self.differentiate))
            if not self.fold:
                stack.enter_context(unmoved(self.problem.model))
            if self.second_order:  # PyTorch differentiates no other form of attention twice
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            self._exit = stack.pop_all()
            problem = self.problem
            self.draws = Draws.of(problem)
            self.frame = _Frame(problem.model)
            self.buffers = Buffers(problem.buffers, problem.places)
            self.param_copies = self._copies("param")
            self.hyper_copies = self._copies("hyper")
            self.hyper = hyper_tree(self.hyper_copies)
            self.support = problem.group("support")
            self.query = problem.group("query")
            self.externs = {f"extern/{i}": t for i, t in problem.group("extern").items()}
            return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            if kind is not None:  # nothing has happened
                self.draws.restore()
            elif self.fold:
                self.buffers.write_back()
        finally:
            self._exit.close()

    # One task

    def inner(self, index: int) -> _Task:
        """Adapt one task: K steps of the update rule from the shared parameters."""
        problem = self.problem
        params = {name: self.param_copies[name] for name in problem.adapted}
        task = _Task(index, params, self._slices("support", index), self._slices("query", index))
        initial = dict(params)
        with self._at(index, 0, task.support), problem.update.reading(self.hyper):
            state = problem.update.init(dict(params), self.hyper)
        for step in range(problem.steps):
            with self._at(index, step, task.support):
                grads = self._support_gradient(task, step)
                k = torch.full((), float(step), dtype=problem.parameter.dtype, device=problem.parameter.device)
                with problem.update.reading(self.hyper):
                    made = problem.update.update(task.params, grads, state, self.hyper, k, initial)
                if not (isinstance(made, (tuple, list)) and len(made) == 2):
                    got, way_out = type(made).__name__, "return params, state, the state as given where there is none"
                    raise InputError(message("update rule", f"a {got}", "a pair (params, state)", way_out))
                params, state = made
                task.params = _require_same_tree(params, initial)
        return task

    def task(self, index: int) -> _Task:
        """Adapt one task and run its query loss."""
        task = self.inner(index)
        problem = self.problem
        with self._at(index, problem.steps, task.query):
            batch = tasks.unflatten(task.query, cast(pytree.TreeSpec, problem.query_spec))
            task.loss, task.outputs = self._query_loss(task.params, batch)
            if problem.return_outputs:
                tasks.require_outputs(task.outputs)
        return task

    def _query_loss(self, params: Params, batch: Any) -> tuple[Tensor, Any]:
        """The query loss and outputs. Where a gradient follows later, the loss sees what it will see then: parameters
        that carry a graph (it may take a gradient of its own), though this pass lets go of it."""
        objective = self.problem.query_objective
        if self.differentiate or not self.problem.wrt:
            return self._call(objective, params, batch)
        with torch.enable_grad():
            leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
            results = self._call(objective, leaves, batch)
        detached: tuple[Tensor, Any] = pytree.tree_map_only(Tensor, Tensor.detach, results)
        return detached

    def _support_gradient(self, task: _Task, step: int) -> Params:
        """The gradient of the support loss in the adapted parameters; with a graph for second order only."""
        params = task.params = _distinct(task.params)
        with torch.enable_grad():
            if not self.second_order:
                params = {name: p.detach().requires_grad_() for name, p in params.items()}
            batch = tasks.unflatten(task.support, self.problem.support_spec)
            loss, _ = self._call(self.problem.inner_objective, params, batch)
            task.step_losses.append(loss.detach())
            grads = _grad([loss], list(params.values()), [None], create_graph=self.second_order)
        pairs = zip(params.items(), grads, strict=True)
        return {name: torch.zeros_like(p) if g is None else g for (name, p), g in pairs}

    def _call(self, objective: Objective, params: Params, batch: Any) -> tuple[Tensor, Any]:
        """Run an objective under the given parameters; the passes' buffers go from one to the next."""
        places = self.problem.places
        values = {**self.param_copies, **params}
        named = {"model." + place: value for name, value in values.items() for place in places.get(name, (name,))}
        named.update({"model." + name: value for name, value in self.buffers.named().items()})
        result = torch.func.functional_call(self.frame, named, (objective, batch), tie_weights=False)
        self.buffers.update({name.removeprefix("model."): value for name, value in named.items()})
        loss, outputs = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
        return _require_scalar(loss), outputs

    # Leaves and gradients

    def _copies(self, kind: str) -> Params:
        """Leaves of our own in place of the shared ones; adapted parameters always carry a graph."""
        copies = {}
        for name, leaf in self.problem.group(kind).items():
            wanted = f"{kind}/{name}" in self.wanted
            adapts = self.differentiate and kind == "param" and name in self.problem.adapted
            copies[name] = _own(leaf).requires_grad_(wanted or adapts)
        return copies

    def _slices(self, kind: str, index: int) -> list[Tensor]:
        """One task's part of a batch, as leaves of its own where their gradient is wanted."""
        leaves = self.support if kind == "support" else self.query
        return [_own(leaf[index]).requires_grad_(f"{kind}/{i}" in self.wanted) for i, leaf in leaves.items()]

    def accumulate(self, task: _Task, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """Add the gradient of sum <value, cotangent> over `pairs` to the sums."""
        if not pairs or not self.wanted:
            return
        shared = {f"param/{n}": t for n, t in self.param_copies.items()}
        shared.update({f"hyper/{n}": t for n, t in self.hyper_copies.items()})
        shared = {key: t for key, t in {**shared, **self.externs}.items() if key in self.wanted}
        own = {f"support/{i}": t for i, t in enumerate(task.support)}
        own.update({f"query/{i}": t for i, t in enumerate(task.query)})
        own = {key: t for key, t in own.items() if key in self.wanted}
        values, cotangents = zip(*pairs, strict=True)
        grads = dict(zip([*shared, *own], _grad(values, [*shared.values(), *own.values()], cotangents), strict=True))
        for key, tensor in shared.items():
            grad = grads[key]
            if grad is not None:
                if key not in self.sums:  # a sum of its own: autograd may hand out one tensor twice
                    self.sums[key] = torch.zeros_like(tensor, requires_grad=False)
                self.sums[key] += grad.detach()
        for key in own:
            grad = grads[key]
            self.per_task.setdefault(key, []).append(None if grad is None else grad.detach())

    def gradients(self) -> dict[str, Tensor | None]:
        """The gradient of every wanted leaf, None where nothing depends on it."""
        return {key: self.sums.get(key) if key in self.sums else self._stacked(key) for key in self.problem.wrt}

    def _stacked(self, key: str) -> Tensor | None:
        grads = self.per_task.get(key, [])
        if all(grad is None for grad in grads):
            return None
        leaf = self.problem.leaves[key]
        return torch.stack([torch.zeros_like(leaf[t]) if g is None else g for t, g in enumerate(grads)])

    # Results

    def outcome(self, passed: list[_Task]) -> Outcome:
        """Losses and outputs of all tasks, stacked."""
        outputs = None
        if self.problem.return_outputs:
            outputs = tasks.stack([task.outputs for task in passed], "outputs of the query objective")
        losses = torch.stack([task.loss for task in passed])
        return Outcome(losses=losses, step_losses=self.step_losses(passed), outputs=outputs, draws=self.draws)

    def step_losses(self, passed: list[_Task]) -> Tensor:
        """The support losses, `(T, steps)`."""
        if self.problem.steps == 0:
            return self.problem.parameter.new_empty((len(passed), 0))
        return torch.stack([torch.stack(task.step_losses) for task in passed])

    def _at(self, task: int, step: int, batch: list[Tensor]) -> contextlib.AbstractContextManager[None]:
        return located(position(task, step, self.problem.steps), batch)


class located:
    """Say where an error of the model, the loss or the update rule came from, and with which tensors of one task.

    A class, no generator: `contextlib` lets a StopIteration that the loss raised through as it was, since an error of
    ours caused by one looks as what Python makes of it in a generator (PEP 479). Whoever iterates over calls would
    take it for the end.
    """

    def __init__(self, where: str, batch: Sequence[Tensor]) -> None:
        self.where, self.batch = where, batch

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError, Warning)):
            return
        if isinstance(error, MetafastError):
            raise type(error)(f"{self.where}: {error}") from error.__cause__
        if isinstance(error, Exception):
            raise _explained(error, self.where, self.batch) from error


def _own(leaf: Tensor) -> Tensor:
    """A copy of the leaf's values without its graph: the losses may write to it."""
    return leaf.detach().clone()


def _grad(
    values: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    *,
    create_graph: bool = False,
) -> Sequence[Tensor | None]:
    """`torch.autograd.grad` that takes values and inputs nothing depends on."""
    kept = [(v, c if c is None else c.to(v.dtype)) for v, c in zip(values, cotangents, strict=True) if v.requires_grad]
    if not kept or not inputs:
        return [None] * len(inputs)
    outputs, seeds = zip(*kept, strict=True)
    return torch.autograd.grad(outputs, inputs, seeds, create_graph=create_graph, allow_unused=True)


def _require_scalar(loss: Any) -> Tensor:
    way_out = "reduce it, e.g. loss.mean(); outputs go beside it: return loss, outputs"
    if not isinstance(loss, Tensor):
        raise InputTypeError(message("loss", type(loss).__name__, "a 0-dim tensor", way_out))
    if loss.dim() != 0:
        raise InputError(message("loss", f"shape {tuple(loss.shape)}", "a scalar, shape ()", way_out))
    if not loss.is_floating_point():
        raise InputTypeError(message("loss", loss.dtype, "a floating-point scalar", "compute it in float32 or float64"))
    return loss


def _require_same_tree(params: Any, initial: Params) -> Params:
    """An update rule must give back every parameter, in its shape and dtype."""
    place, way_out = "update rule", "return (params, state), params with the names, shapes and dtypes it was given"
    if not isinstance(params, dict) or params.keys() != initial.keys():
        got = sorted(params) if isinstance(params, dict) else type(params).__name__
        raise InputError(message(place, got, f"parameters {sorted(initial)}", way_out))
    for name, value in params.items():
        got = f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        want = f"{tuple(initial[name].shape)} {initial[name].dtype}"
        if got != want:
            raise InputError(message(place, f"{got} for {name}", want, way_out))
    return {name: params[name] for name in initial}


def _distinct(params: Params) -> Params:
    """One tensor given for several parameters is several values: autograd would give each the gradient of all."""
    seen: set[int] = set()
    made = {}
    for name, value in params.items():
        made[name] = value.view_as(value) if id(value) in seen else value
        seen.add(id(value))
    return made


def _explained(error: Exception, where: str, batch: Sequence[Tensor]) -> Exception:
    """The error of a model or loss, with its place."""
    try:
        text = str(error)
    except Exception:  # an error that cannot even say what it is keeps its place
        text = ""
    if isinstance(error, IndexError) and "out of bounds" in text:
        labels = [t for t in batch if not t.is_floating_point() and t.numel()]
        span = ", ".join(f"[{int(t.min())}, {int(t.max())}]" for t in labels) or "unknown"
        got = f"labels in {span} ({text.rstrip('.')})"
        way_out = "number the classes of each task from 0, or widen the model's output"
        expected = "0 .. classes - 1 of the model's output"
        return LabelError(message(f"{where}: label out of range", got, expected, way_out))
    got = f"a task's tensors {tasks.describe(batch)}"
    way_out = "each task's part of the batch is what the model and the loss see"
    raised = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return TaskError(f"{where}: {raised}; {message('batch', got, 'what they take', way_out)}")
