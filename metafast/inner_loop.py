"""The inner loop of gradient-based meta-learning as a module."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import dispatch
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
from .fast_weights import FastWeights
from .outline import NO_QUERY, Outline
from .problem import Loss, Objective, Outcome, Problem
from .reference import swapping
from .transforms import outside_compile, traced, tracing
from .updates import UpdateRule

if TYPE_CHECKING:
    from .profile import Profile

__all__ = ["InnerLoop"]

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
    - `reduction`: "mean" or "sum" over tasks, or "none" for `(T,)`. `return_outputs`: return the query outputs as well.
    - `backend`: "auto" goes native where it can and warns once a plan where it cannot (`FallbackWarning`); "native"
      raises there; "torch" is eager PyTorch, task by task; "cuda" is kept for a backend that is not built yet. A model
      on a GPU runs on "torch".
    - `nonfinite`: "warn" or "raise" when a loss is not finite.
    - `memory_budget`: the most bytes that all threads together may take natively for the states of steps (parameters
      and state of the rule, with what is kept beside them), or None: a state of every step. Where these are too many,
      every n-th is held and the others are made again from there, with the least n that fits: ⌊K/n⌋ + n states of each
      task in work, (⌈K/n⌉ − 1)(n − 1) inner steps more, at most one more forward (Chen et al., arXiv:1604.06174;
      Griewank & Walther 2000, Algorithm 799). No result depends on it. `explain` shows what was chosen.

    `steps`, `order`, `reduction`, `return_outputs`, `backend`, `nonfinite` and `memory_budget` are attributes and may
    be set between calls. `parameters()` yields the model's and the learnable hyper-parameters. Random draws in the
    losses follow PyTorch's, Python's and NumPy's generators; a backward that replays draws the same numbers. Running
    statistics change as in an eager loop over the tasks in order, once a call.

    **Raises** `InputError` (a ValueError) or `InputTypeError` (a TypeError) for options that cannot be used; a call,
    `BackendError` for a backend that is not there or cannot take the problem, `InputError` for a `memory_budget` that
    no n fits, with the least that would do.

    **Accuracy**: the meta-gradient is within 1e-9 of eager autograd's in float64, relative, and in float32 within 4
    times the error of PyTorch's own float32 against float64. Subnormal numbers count as zero inside a native replay.
    The same inputs give the same bits on any number of threads.

    **Cost**, of a task: K support gradients and updates; the query loss and its gradient; then, backwards, K times the
    VJP of U and, for order 2, one Hessian-vector product, as the tangent of the gradient (forward over reverse, as
    MixFlow-MG, arXiv:2505.00793). Natively the memory beyond data and results is that of one step and of K + 1 copies
    of parameters and state for each thread (and 256 KiB at most of products that steps keep), fewer with a
    `memory_budget`, and at most 16 sums of gradients (64 where they are small), whatever T; eager PyTorch keeps the
    graph of one task's K steps.
    The first call with new shapes makes a plan: it runs the losses of one task in eager PyTorch, compiles, and compares
    the two. A model keeps the last 64.
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
        memory_budget: int | None = None,
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
        self.memory_budget = memory_budget
        self._params = (params,)  # in a tuple: a module in here is no submodule
        self._outline: Outline | None = None
        self._outline = Outline(self)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "steps":
            _require_steps(value)
        elif name == "memory_budget":
            _require_budget(value)
        elif name in _CHOICES:
            _require_choice(name, value)
        super().__setattr__(name, value)
        if name not in _CHOICES and name not in ("memory_budget", "_outline"):
            self.__dict__["_outline"] = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_outline": None}

    def extra_repr(self) -> str:
        """The options, for `print(inner)`."""
        budget = "" if self.memory_budget is None else f", memory_budget={self.memory_budget}"
        return f"steps={self.steps}, order={self.order}, reduction={self.reduction!r}, backend={self.backend!r}{budget}"

    # What a user calls

    @outside_compile
    def forward(self, support: Any, query: Any) -> Any:
        """Adapt every task and return the query loss; `backward()` on it gives the meta-gradient.

        **Arguments**: `support`, `query`: batches, every tensor `(T, ...)`, float32 or float64 (or an integer type)
        on the model's device, of any strides.
        **Returns** the loss in the model's dtype and on its device, 0-dim for "mean" and "sum", `(T,)` for "none"; with
        `return_outputs=True` a pair `(loss, outputs)`, outputs as the query objective returns them (the model's output
        for a `loss`), stacked to `(T, ...)`. Both are differentiable once.
        **Raises** `InputError` and `InputTypeError` for batches that cannot be used, `LabelError` for labels out of
        range, `TaskError` (both with task and step) for what model or loss raise, `NonFiniteError` if asked for; its
        backward, `InputChangedError` where something it had read was changed in place, and `DoubleBackwardError`
        where it is differentiated itself. **Warns** `NonFiniteWarning`, `FallbackWarning`.

        **Cost**: for "mean" and "sum" the meta-gradient is made along with the loss, and backward only scales it. With
        "none" or outputs the forward makes the loss alone, and backward runs the whole loop again with the true
        cotangents. Under `torch.no_grad()` only the forward runs.
        """
        problem, outline = self._problem(support, query, gradient=torch.is_grad_enabled())
        ready = bool(problem.wrt) and problem.reduction != "none" and not problem.return_outputs
        call = FusedCall(problem, self.backend, self._checked, ready=ready, weights=outline.weights)
        results = self._guarded(launch, call, problem)
        if not self.return_outputs:
            return results[0]
        return results[0], pytree.tree_unflatten(results[1:], cast(pytree.TreeSpec, call.outputs_spec))

    @outside_compile
    def meta_gradient(self, support: Any, query: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the meta-gradient, without autograd around them; `.grad` is left alone.

        **Arguments**: as for the call itself.
        **Returns** `(loss, gradients)`: the loss (reduced as `reduction` says; the gradient for "none" is that of the
        sum), and a mapping from name to gradient, in shape, dtype and device of what it is the gradient of. Names are
        the model's own for its parameters, "update.<name>" for learnable hyper-parameters, "support/<i>" and
        "query/<i>" for the i-th tensor of a batch that requires grad, and the name among `named_parameters()`, else
        "extern/<i>", for a tensor found in a closure or attribute. Zeros where nothing depends on it. Also inside
        `torch.no_grad()`.
        **Raises** as the call does, and `TransformError` under torch.func transforms and forward-mode autograd.
        **Cost**: that of the call, less autograd around it.
        """
        outline = self._outline
        if outline is not None and (made := outline.gradient_again(self, support, query)) is not None:
            return made
        if tracing():
            way_out = "differentiate the loss of inner(support, query) in reverse mode instead"
            place = "InnerLoop.meta_gradient under a transform or forward-mode autograd"
            raise TransformError(message(place, "a gradient that is a plain value", "one to differentiate", way_out))
        problem, outline = self._problem(support, query, gradient=True)
        loss, gradients = self._guarded(functools.partial(self._with_gradient, outline), problem, problem)
        return loss, outline.named(problem, gradients)

    @outside_compile
    def adapt(self, support: Any) -> FastWeights:
        """Adapt every task and return the adapted parameters, differentiable.

        **Arguments**: `support`, as for the call. **Returns** a `FastWeights`: a mapping from name to `(T, *shape)`, in
        the model's dtype and on its device; any loss on it may be differentiated once.
        **Raises** as the call does.
        **Cost**: T copies of the adapted parameters. A backward runs the inner loop again, then the K steps back.
        """
        problem, outline = self._problem(support, NO_QUERY, gradient=torch.is_grad_enabled())
        call = AdaptCall(problem, self.backend, self._checked)
        tensors = self._guarded(launch, call, problem)
        adapted = dict(zip(problem.adapted, tensors, strict=True))
        return FastWeights(self.model, outline.structure, adapted, problem.tasks)

    @outside_compile
    def explain(self, support: Any, query: Any) -> Any:
        """Which backend takes a call with these batches and why; where native, its graphs, program, flops and memory.

        **Arguments**: as for the call itself. **Returns** a text to print, one line an instruction; flops by section,
        of one task and step, and of the call; memory in bytes a worker. **Raises** for batches as the call does.
        **Cost**: makes the plan that a call would make; runs no replay beyond its check.
        """
        return dispatch.explain(self._problem(support, query, gradient=True)[0], self.backend)

    @outside_compile
    def profile(self, support: Any, query: Any, repeats: int = 5) -> Profile:
        """Time, GFLOP/s and GB/s of every native instruction of one meta-gradient, on one thread.

        **Arguments**: `support`, `query`, as for the call; `repeats`, of which each instruction's least time is taken.
        **Returns** a `Profile`: `print` it, `.rows` and `.sections()` are its numbers, `.save("profile.png")` draws it.
        Running statistics and `.grad` are left alone. **Raises** `BackendError` where the call falls back to PyTorch,
        `InputTypeError` or `InputError` for repeats that are no number from 1 up.
        """
        _require_repeats(repeats)
        problem, outline = self._problem(support, query, gradient=True)
        return dispatch.profile(problem, self.backend, outline.weights(problem), repeats)

    # Running it

    def _problem(self, support: Any, query: Any, *, gradient: bool) -> tuple[Problem, Outline]:
        """The problem that a call with these batches poses, validated, and the outline it was made from."""
        with swapping:  # another thread may have other tensors on the model just now
            outline = self._outline
            problem = None if outline is None else outline.again(self, support, query, gradient=gradient)
            if outline is None or problem is None:
                problem, outline = self._looked_into(support, query, gradient)
            return problem, outline

    def _looked_into(self, support: Any, query: Any, gradient: bool) -> tuple[Problem, Outline]:
        if traced():
            place = "InnerLoop under make_fx, torch.export, jit.trace, linearize or fake tensors"
            way_out = "call it outside of what is traced"
            raise TransformError(message(place, "a call to trace", "tensors with values", way_out))
        outline, problem = self._outline, None
        if outline is not None and outline.current():
            problem = outline.problem(self, support, query, gradient=gradient)
        if outline is None or problem is None:
            outline = self.__dict__["_outline"] = Outline(self)
            problem = cast(Problem, outline.problem(self, support, query, gradient=gradient))
        return problem, outline

    def _with_gradient(self, outline: Outline, problem: Problem) -> tuple[Tensor, Sequence[Tensor]]:
        """The loss and the gradients in the order of `wrt`, zeros where nothing depends on a leaf."""
        backend = dispatch.choose(problem, self.backend)
        outcome = backend.meta_gradient(problem, outline.weights(problem), fold=True)
        self._checked(outcome, problem)
        return outcome.reduced(problem.reduction), outcome.filled(problem)

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
            if outcome.draws is not None:
                outcome.draws.restore()
            raise NonFiniteError(text)
        warn(text, NonFiniteWarning)


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


def _require_steps(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputTypeError(message("InnerLoop(steps=...)", repr(value), "an int", "pass steps=5"))
    if value < 0:
        raise InputError(message("InnerLoop(steps=...)", value, "0 or more", "steps=0 evaluates without adapting"))


def _require_budget(value: Any) -> None:
    place, way_out = "InnerLoop(memory_budget=...)", "pass e.g. 512 * 2**20, or None for a state of every step"
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise InputTypeError(message(place, repr(value), "an int, in bytes, or None", way_out))
    if value is not None and value < 1:
        raise InputError(message(place, value, "1 or more", way_out))


def _require_repeats(value: Any) -> None:
    place, way_out = "InnerLoop.profile(repeats=...)", "leave it at 5"
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputTypeError(message(place, repr(value), "an int", way_out))
    if value < 1:
        raise InputError(message(place, value, "1 or more", way_out))


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
