"""The inner loop of gradient-based meta-learning as a module."""

from __future__ import annotations

import fnmatch
import functools
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import dispatch, tasks
from .autograd import AdaptCall, FusedCall, launch
from .errors import (
    InputError,
    InputTypeError,
    NonFiniteError,
    NonFiniteWarning,
    TransformError,
    message,
    position,
    warn,
)
from .externs import Places, find_externs
from .fast_weights import FastWeights
from .problem import Objective, Outcome, Problem
from .reference import swapping
from .structure import Structure
from .transforms import outside_compile, tracing, transformed
from .updates import UpdateRule

__all__ = ["InnerLoop"]

Loss = Callable[[Any, Any], Tensor]

_CHOICES: dict[str, tuple[Any, ...]] = {
    "order": (1, 2),
    "reduction": ("mean", "sum", "none"),
    "backend": ("auto", "native", "cuda", "torch"),
    "nonfinite": ("warn", "raise"),
    "return_outputs": (False, True),
}


class InnerLoop(nn.Module):
    r"""The inner loop over a batch of tasks, its query loss, and the meta-gradient through it.

    For each task with support batch S and query batch Q, from the meta-parameters \(\phi_0\):

    $$\phi_{k+1}, s_{k+1} = U(\phi_k, \nabla_\phi L(\phi_k; S), s_k), \qquad \text{loss} = L_q(\phi_K; Q).$$

    >>> inner = InnerLoop(model, F.cross_entropy, update=SGD(lr=0.4), steps=5)      # doctest: +SKIP
    >>> inner(support, query).backward()                                            # doctest: +SKIP

    **Arguments**

    - `model`: any module. `model.training` and the flags below it are respected at each call.
    - `loss(output, target) -> scalar`, for batches `(x, y)`; or `objective(model, batch) -> scalar` or `(scalar,
      outputs)`, for batches of any nesting of tuples, lists and dicts of tensors. It sees one task, without the task
      dimension.
    - `update`: the inner update rule, e.g. `SGD(lr=0.4)`.
    - `steps`: inner steps K, from 0 up.
    - `order`: 2 differentiates the support gradient too (MAML, Finn et al., arXiv:1703.03400, equation 1); 1 takes it
      as a constant (FOMAML, section 5.2 there), while state and hyper-parameters still receive their gradients.
    - `query_loss`, `query_objective`: where the outer loss differs from the inner one.
    - `params`: what adapts: a name or glob pattern (`"head.*"`), a submodule, a predicate `(name, parameter) ->
      bool`, or a list of these; all parameters by default. A pattern may match any name of a tied parameter. The
      others are shared by all tasks. `requires_grad` decides what receives a meta-gradient, adapted or not.
    - `reduction`: "mean" or "sum" over tasks, or "none" for `(T,)`. `return_outputs`: return the query outputs as
      well. With "none" or outputs, backward runs the inner loop again with the true cotangents: twice the forward's
      time, and memory that does not grow with T.
    - `backend`: "auto", "native", "cuda" or "torch". `nonfinite`: "warn" or "raise" when a loss is not finite.

    `parameters()` yields the model's and the learnable hyper-parameters. Random draws in the losses follow PyTorch's
    generators; a backward that replays draws the same numbers. Running statistics change as in an eager loop over the
    tasks in order, once a call.

    **Raises** `InputError` (a ValueError) or `InputTypeError` (a TypeError) for options that cannot be used.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss | None = None,
        *,
        objective: Objective | None = None,
        update: UpdateRule,
        steps: int,
        order: int = 2,
        query_loss: Loss | None = None,
        query_objective: Objective | None = None,
        params: Any = None,
        reduction: str = "mean",
        return_outputs: bool = False,
        backend: str = "auto",
        nonfinite: str = "warn",
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise InputTypeError(message("InnerLoop(model)", type(model).__name__, "an nn.Module", "wrap it in one"))
        if not isinstance(update, UpdateRule):
            way_out = "pass e.g. update=metafast.SGD(lr=0.4)"
            raise InputTypeError(message("InnerLoop(update=...)", type(update).__name__, "an UpdateRule", way_out))
        _require_one("loss", loss, "objective", objective, needed=True)
        _require_one("query_loss", query_loss, "query_objective", query_objective, needed=False)
        self.model = model
        self.update = update
        self.loss, self.objective = loss, objective
        self.query_loss, self.query_objective = query_loss, query_objective
        self.steps = steps
        self.order = order
        self.reduction = reduction
        self.return_outputs = return_outputs
        self.backend = backend
        self.nonfinite = nonfinite
        self._params = (params,)  # in a tuple: a module in here is no submodule
        self._layout: _Layout | None = None
        self._layout_now()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "steps":
            _require_steps(value)
        elif name in _CHOICES:
            _require_choice(name, value)
        super().__setattr__(name, value)
        if name not in _CHOICES and name != "_layout":
            self.__dict__["_layout"] = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_layout": None}

    def extra_repr(self) -> str:
        """The options, for `print(inner)`."""
        return f"steps={self.steps}, order={self.order}, reduction={self.reduction!r}, backend={self.backend!r}"

    # What a user calls

    @outside_compile
    def forward(self, support: Any, query: Any) -> Any:
        """Adapt every task and return the query loss; `backward()` on it gives the meta-gradient.

        **Arguments**: `support`, `query`: batches, every tensor `(T, ...)`, float32 or float64 (or an integer type)
        on the model's device, of any strides.
        **Returns** the loss, 0-dim for "mean" and "sum", `(T,)` for "none"; with `return_outputs=True` a pair
        `(loss, outputs)`, outputs as the query objective returns them (the model's output for a `loss`), stacked to
        `(T, ...)`. Both are differentiable once; backward of backward raises `DoubleBackwardError`.
        **Raises** `InputError` and `InputTypeError` for batches that cannot be used, `LabelError` for labels out of
        range, `TaskError` (both with task and step) for what model or loss raise, `NonFiniteError` if asked for.
        **Warns** `NonFiniteWarning`. Under `torch.no_grad()` only the forward runs.
        """
        problem = self._problem(support, query, gradient=torch.is_grad_enabled())
        ready = bool(problem.wrt) and self.reduction != "none" and not self.return_outputs
        weights = functools.partial(self._layout_now().weights, self.reduction)
        call = FusedCall(
            problem, self.backend, self._checked, ready=ready, reduction=self.reduction, weights=weights
        )
        results = self._guarded(launch, call, problem)
        if not self.return_outputs:
            return results[0]
        return results[0], pytree.tree_unflatten(results[1:], cast(pytree.TreeSpec, call.outputs_spec))

    @outside_compile
    def meta_gradient(self, support: Any, query: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the meta-gradient, without autograd around them; `.grad` is left alone.

        **Arguments**: as for the call itself.
        **Returns** `(loss, gradients)`: the loss (reduced as `reduction` says; the gradient for "none" is that of the
        sum), and a mapping from name to gradient. Names are the model's own for its parameters, "update.<name>" for
        learnable hyper-parameters, "support/<i>" and "query/<i>" for the i-th tensor of a batch that requires grad,
        and the name among `named_parameters()`, else "extern/<i>", for a tensor found in a closure or attribute.
        Zeros where nothing depends on it. Also inside `torch.no_grad()`. **Raises** as the call does.
        """
        if tracing():
            way_out = "differentiate the loss of inner(support, query) instead"
            place = "InnerLoop.meta_gradient under a transform or forward-mode autograd"
            raise TransformError(message(place, "a gradient that is a plain value", "one to differentiate", way_out))
        problem = self._problem(support, query, gradient=True)
        outcome = self._guarded(self._with_gradient, problem, problem)
        losses = cast(Tensor, outcome.losses)
        loss = losses if self.reduction == "none" else losses.mean() if self.reduction == "mean" else losses.sum()
        return loss, self._named(problem, outcome)

    @outside_compile
    def adapt(self, support: Any) -> FastWeights:
        """Adapt every task and return the adapted parameters, differentiable.

        **Arguments**: `support`, as for the call. **Returns** a `FastWeights`: a mapping from name to `(T, *shape)`;
        any loss on it may be differentiated, its backward runs the inner loop again. **Raises** as the call does.
        """
        problem = self._problem(support, None, gradient=torch.is_grad_enabled())
        call = AdaptCall(problem, self.backend, self._checked)
        tensors = self._guarded(launch, call, problem)
        layout = self._layout_now()
        adapted = dict(zip(problem.adapted, tensors, strict=True))
        return FastWeights(self.model, layout.structure, adapted, problem.tasks)

    @outside_compile
    def explain(self, support: Any, query: Any) -> Any:
        """Which backend takes a call with these batches and why, with graph, plan, flops and memory; print it."""
        return dispatch.explain(self._problem(support, query, gradient=True), self.backend)

    # What one call means

    def _problem(self, support: Any, query: Any | None, *, gradient: bool) -> Problem:
        """The problem that a call with these batches poses, validated."""
        with swapping:  # another thread may have other tensors on the model just now
            return self._pose(support, query, gradient=gradient)

    def _pose(self, support: Any, query: Any | None, *, gradient: bool) -> Problem:
        layout = self._layout_now()
        batches, specs = self._batches(support, query)
        parameters = layout.structure.parameters()
        _require_dtype(layout.adapted[0], parameters[layout.first_adapted])
        count = tasks.count_tasks(batches, parameters[0].device)
        leaves: dict[str, Tensor] = dict(zip(layout.parameter_keys, parameters, strict=True))
        for name, value in self.update.hyper(parameters[layout.first_adapted]).items():
            leaves["hyper/" + name] = value
        for place, _, tensors in batches:
            for index, tensor in enumerate(tensors):
                leaves[f"{place}/{index}"] = tensor
        if any(leaf.is_inference() for leaf in leaves.values()):
            leaves = {key: _ordinary(leaf) for key, leaf in leaves.items()}
        problem = Problem(
            model=self.model,
            inner_objective=layout.objectives[0],
            query_objective=layout.objectives[1],
            update=self.update,
            steps=self.steps,
            order=self.order,
            leaves=leaves,
            adapted=layout.adapted,
            support_spec=specs[0],
            query_spec=specs[1] if query is not None else None,
            tasks=count,
            wrt=(),
            return_outputs=self.return_outputs and query is not None,
            buffers=dict(zip(layout.structure.buffer_names, layout.structure.buffers(), strict=True)),
            aliases=layout.structure.aliases,
        )
        if gradient or tracing():
            self._want(problem, leaves, layout)
        return problem

    def _batches(self, support: Any, query: Any | None) -> tuple[list[tuple[str, Any, list[Tensor]]], list[Any]]:
        """The batches with their places, tensors and nesting."""
        batches: list[tuple[str, Any, list[Tensor]]] = []
        specs = []
        for place, batch, plain in self._given(support, query):
            tensors, spec = tasks.flatten(batch, place)
            if plain:
                tasks.require_pair(place, spec, tensors)
            batches.append((place, batch, tensors))
            specs.append(spec)
        return batches, specs

    def _given(self, support: Any, query: Any | None) -> Iterable[tuple[str, Any, bool]]:
        """Place, batch, and whether a plain loss reads it."""
        yield "support", support, self.objective is None
        if query is not None:
            replaced = self.query_loss is not None or self.query_objective is not None
            yield "query", query, (self.query_objective if replaced else self.objective) is None

    def _want(self, problem: Problem, leaves: dict[str, Tensor], layout: _Layout) -> None:
        """Add tensors found in closures and attributes, and say which leaves want a gradient."""
        if not transformed():  # there they are looked for once the wrappers are off
            for index, tensor in enumerate(layout.externs(problem)):
                leaves[f"extern/{index}"] = tensor
        if tracing():  # what requires grad does not show through all transforms: take every leaf that could
            wrt = tuple(key for key, leaf in leaves.items() if leaf.is_floating_point())
        else:
            wrt = tuple(key for key, leaf in leaves.items() if leaf.requires_grad)
        object.__setattr__(problem, "wrt", wrt)

    def _objectives(self) -> tuple[Objective, Objective]:
        inner = self.objective if self.objective is not None else _LossObjective(cast(Loss, self.loss))
        if self.query_objective is not None:
            return inner, self.query_objective
        return inner, inner if self.query_loss is None else _LossObjective(self.query_loss)

    def _layout_now(self) -> _Layout:
        """The cached layout, rebuilt when the model's structure or the update rule changed."""
        layout = self._layout
        if layout is None or not layout.current(self):
            layout = _Layout(self)
            self.__dict__["_layout"] = layout
        return layout

    # Running it

    def _with_gradient(self, problem: Problem) -> Outcome:
        backend = dispatch.choose(problem, self.backend)
        outcome = backend.meta_gradient(problem, self._layout_now().weights(self.reduction, problem), fold=True)
        self._checked(outcome, problem)
        return outcome

    def _guarded(self, function: Callable[[Any], Any], argument: Any, problem: Problem) -> Any:
        """Run a call; with `nonfinite="raise"` an error leaves the buffers as they were."""
        if torch.is_inference_mode_enabled():  # what is saved between passes must be ordinary tensors
            with torch.inference_mode(False), torch.no_grad():
                return self._guarded(function, argument, problem)
        if self.nonfinite == "warn" or not problem.buffers:
            return function(argument)
        before = {name: buffer.detach().clone() for name, buffer in problem.buffers.items()}
        try:
            return function(argument)
        except NonFiniteError:
            with torch.no_grad():
                for name, buffer in problem.buffers.items():
                    buffer.copy_(before[name])
            raise

    def _checked(self, outcome: Outcome, problem: Problem) -> None:
        """Warn or raise if a loss of the outcome is not finite."""
        if outcome.finite or (outcome.finite is None and _all_finite(outcome)):
            return
        found = _first_nonfinite(outcome)
        if found is None:
            return
        task, step, value = found
        rates = ", ".join(f"{k} {v.item():g}" for k, v in problem.group("hyper").items() if v.dim() == 0)
        text = f"{position(task, step, problem.steps)}: loss became {value:g}" + (f" (inner {rates})" if rates else "")
        text += "; lower the inner learning rate, or look for a log or division in the loss"
        if self.nonfinite == "raise":
            raise NonFiniteError(text)
        warn(text, NonFiniteWarning)

    def _named(self, problem: Problem, outcome: Outcome) -> dict[str, Tensor]:
        """Gradients by the names that `meta_gradient` promises; a tensor that is several leaves appears once."""
        assert outcome.gradients is not None
        named: dict[str, Tensor] = {}
        names: dict[int, str] = {}
        for key, grad in outcome.gradients.items():
            leaf = problem.leaves[key]
            name = names.setdefault(id(leaf), self._name(key, leaf))
            grad = torch.zeros_like(leaf) if grad is None else grad
            named[name] = named[name] + grad if name in named else grad
        return named

    def _name(self, key: str, leaf: Tensor) -> str:
        kind, _, name = key.partition("/")
        if kind == "param":
            return name
        if kind == "hyper":
            return "update." + name
        if kind == "extern":
            return next((n for n, p in self.named_parameters() if p is leaf), key)
        return key


class _LossObjective:
    """A loss of (output, target) as an objective on batches (x, y)."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        x, y = batch
        output = model(x)
        return self.loss(output, y), output


class _Layout:
    """What holds from call to call: names, what adapts, tensors found outside."""

    def __init__(self, inner: InnerLoop) -> None:
        self.structure = Structure(inner.model)
        names, tensors = self.structure.parameter_names, self.structure.parameters()
        if not names:
            way_out = "there is nothing to adapt; give it parameters"
            raise InputError(message("InnerLoop(model)", "a model without parameters", "at least one", way_out))
        self.parameter_keys = ["param/" + name for name in names]
        self.adapted = _select(inner.model, inner._params[0], names, tensors, self.structure.aliases)
        self.first_adapted = names.index(self.adapted[0])
        shapes = {name: tensor.shape for name, tensor in zip(names, tensors, strict=True) if name in set(self.adapted)}
        for name, tensor in zip(names, tensors, strict=True):
            if name in shapes:
                _require_dtype(name, tensor)
        inner.update.check(shapes, self.structure.aliases)
        self._changes = inner.update.changes
        self.objectives = inner._objectives()
        self._places: Places | None = None
        self._externs: dict[Any, list[Any]] = {}
        self._weights: dict[Any, Tensor] = {}

    def current(self, inner: InnerLoop) -> bool:
        """Whether it still describes the model and the update rule."""
        return self._changes == inner.update.changes and self.structure.current()

    def weights(self, reduction: str, problem: Problem) -> Tensor:
        """`(T,)`, the weights of the losses: 1/T for "mean", else 1."""
        like = problem.parameter
        key = (problem.tasks, reduction, like.dtype, like.device)
        if key not in self._weights:
            value = 1.0 / problem.tasks if reduction == "mean" else 1.0
            self._weights[key] = torch.full((problem.tasks,), value, dtype=like.dtype, device=like.device)
        return self._weights[key]

    def externs(self, problem: Problem) -> list[Tensor]:
        """Tensors that the losses read from outside; looked for again when the places that can hold them changed."""
        if self._places is None or not self._places.same():
            roots = (problem.inner_objective, problem.query_objective, problem.update)
            self._places = Places(problem.model, *roots)
            self._externs.clear()
        key: tuple[Any, ...] = (self.structure.training(), problem.steps > 0)
        key += (problem.query_spec is None, problem.return_outputs)
        key += tuple((leaf.shape[1:], leaf.dtype, leaf.requires_grad) for leaf in problem.leaves.values())
        refs = self._externs.get(key)
        found = None if refs is None else [ref() for ref in refs]
        if found is None or any(tensor is None for tensor in found):
            found = list(find_externs(problem))
            self._externs[key] = [weakref.ref(tensor) for tensor in found]
        return cast("list[Tensor]", found)


def _select(
    model: nn.Module, params: Any, names: tuple[str, ...], tensors: list[Tensor], aliases: Mapping[str, tuple[str, ...]]
) -> tuple[str, ...]:
    """The names of the parameters that `params` selects, in the model's order."""
    if params is None:
        return names
    chosen: set[str] = set()
    for item in params if isinstance(params, (list, tuple, set, frozenset)) else (params,):
        chosen |= _matches(model, item, names, tensors, aliases)
    if not chosen:
        way_out = "pass names, glob patterns, a submodule or a predicate"
        raise InputError(message("InnerLoop(params=...)", repr(params), "at least one parameter that adapts", way_out))
    return tuple(name for name in names if name in chosen)


def _matches(
    model: nn.Module, item: Any, names: tuple[str, ...], tensors: list[Tensor], aliases: Mapping[str, tuple[str, ...]]
) -> set[str]:
    """What one entry of `params` selects; never nothing, unless it is a predicate."""
    place = "InnerLoop(params=...)"
    if isinstance(item, str):
        found = {name for name in names if any(fnmatch.fnmatchcase(alias, item) for alias in aliases[name])}
        if not found:
            known = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            way_out = f"the model has {known}; a module's parameters are matched by 'name.*'"
            raise InputError(message(place, f"{item!r}", "a name or pattern that matches something", way_out))
        return found
    if isinstance(item, nn.Module):
        own = {id(p) for p in item.parameters()}
        found = {name for name, tensor in zip(names, tensors, strict=True) if id(tensor) in own}
        if not found:
            got = f"a {type(item).__name__} that shares no parameter with the model"
            raise InputError(message(place, got, "a submodule with parameters", "pass a part of this model"))
        return found
    if callable(item):
        pairs = zip(names, tensors, strict=True)
        return {name for name, tensor in pairs if any(item(alias, tensor) for alias in aliases[name])}
    expected = "names, glob patterns, a submodule, or a predicate (name, parameter) -> bool"
    raise InputTypeError(message(place, type(item).__name__, expected, 'pass e.g. "head.*"'))


def _all_finite(outcome: Outcome) -> bool:
    """One number tells for all: a sum is finite only if its terms are (a sum that overflows is looked at again)."""
    parts = [t for t in (outcome.losses, outcome.step_losses) if t is not None and t.numel()]
    return all(math.isfinite(part.sum().item()) for part in parts)


def _first_nonfinite(outcome: Outcome) -> tuple[int, int, float] | None:
    """Task, step and value of the first loss that is not finite."""
    columns = [] if outcome.step_losses is None else [outcome.step_losses]
    if outcome.losses is not None:
        columns.append(outcome.losses.unsqueeze(1))
    table = torch.cat([c.double() for c in columns], 1)
    bad = (~table.isfinite()).nonzero()
    if bad.numel() == 0:
        return None
    task, step = int(bad[0, 0]), int(bad[0, 1])
    return task, step, float(table[task, step])


def _ordinary(leaf: Tensor) -> Tensor:
    """Inference tensors cannot take part in autograd; copies made outside of that mode can."""
    if not leaf.is_inference():
        return leaf
    with torch.inference_mode(False):
        return leaf.clone()


def _require_dtype(name: str, parameter: Tensor) -> None:
    if parameter.dtype is not torch.float32 and parameter.dtype is not torch.float64:
        way_out = "use model.float(), or leave it out of params="
        raise InputTypeError(message(f"parameter {name}", parameter.dtype, "float32 or float64", way_out))


def _require_steps(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputTypeError(message("InnerLoop(steps=...)", repr(value), "an int", "pass steps=5"))
    if value < 0:
        raise InputError(message("InnerLoop(steps=...)", value, "0 or more", "steps=0 evaluates without adapting"))


def _require_choice(name: str, value: Any) -> None:
    choices = _CHOICES[name]
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        expected = " or ".join(map(repr, choices))
        raise InputError(message(f"InnerLoop({name}=...)", repr(value), expected, "pass one of these"))


def _require_one(name: str, value: Any, other: str, other_value: Any, *, needed: bool) -> None:
    """At most one of two arguments, exactly one where it is needed; each callable."""
    place = f"InnerLoop({name}, {other})"
    if value is not None and other_value is not None:
        way_out = f"{name} reads (output, target), {other} reads (model, batch)"
        raise InputError(message(place, "both", "one of them", way_out))
    if needed and value is None and other_value is None:
        raise InputError(message(place, "neither", "one of them", "pass e.g. F.cross_entropy"))
    for given in (value, other_value):
        if given is not None and not callable(given):
            raise InputTypeError(message(place, type(given).__name__, "a callable", "pass a function or a module"))
