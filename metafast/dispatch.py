"""Which backend takes a problem: the plan cache, the first-use check, the fallback and its warning."""

from __future__ import annotations

import functools
import operator
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from metafast.errors import BackendError, FallbackWarning, message, warn
from metafast.problem import Backend, Problem
from metafast.reference import Reference
from metafast.tasks import nesting

__all__ = ["choose", "explain"]

MOST_PLANS = 64  # a model keeps so many, the oldest go first


@dataclass(frozen=True)
class Choice:
    """A backend and why it was chosen."""

    backend: Backend
    reason: str
    native: bool


_plans: WeakKeyDictionary[nn.Module, dict[Any, Choice]] = WeakKeyDictionary()
_scans: WeakKeyDictionary[nn.Module, _Scan] = WeakKeyDictionary()


def choose(problem: Problem, backend: str) -> Backend:
    """The backend for `problem`: `backend` is "auto", "native", "cuda" or "torch".

    A problem that cannot go native takes the PyTorch reference under "auto", with one FallbackWarning a plan; under
    "native" it raises BackendError.
    """
    return _choice(problem, backend).backend


def _choice(problem: Problem, backend: str) -> Choice:
    if backend == "torch":
        return Choice(Reference(), 'backend="torch" was asked for', False)
    if backend == "cuda":
        raise BackendError(
            message("InnerLoop(backend=...)", "'cuda'", "one that is built in", 'use backend="auto" or "native"')
        )
    plans = _plans.setdefault(problem.model, {})
    key = plan_key(problem)
    found = plans.get(key)
    if found is None:
        if len(plans) >= MOST_PLANS:  # an attribute that changes at every call makes a plan every time
            del plans[next(iter(plans))]
        found = plans[key] = _plan(problem)
        if not found.native and backend == "auto":
            warn(f"metafast falls back to PyTorch: {found.reason}", FallbackWarning)
    if backend == "native" and not found.native:
        raise BackendError(
            message("InnerLoop(backend='native')", found.reason, "a problem that goes native", 'use backend="auto"')
        )
    return found


def _plan(problem: Problem) -> Choice:
    device = problem.parameter.device
    if device.type != "cpu":
        return Choice(Reference(), f"the parameters are on {device}, the native backend runs on the CPU", False)
    try:
        from metafast import _C  # noqa: F401
    except ImportError as error:
        return Choice(Reference(), f"the compiled module cannot be imported ({error})", False)
    from metafast.capture import Unsupported
    from metafast.native import Native, disagreement, make_plan

    try:
        plan, traces = make_plan(problem)
        differs = disagreement(plan, problem, traces)
    except Unsupported as error:
        return Choice(Reference(), str(error), False)
    if differs is not None:
        return Choice(Reference(), f"capture lost something of the forward: {differs}", False)
    return Choice(Native(plan), "every op has a native kernel; the first task agrees with PyTorch's autograd", True)


def explain(problem: Problem, backend: str) -> str:
    """Which backend takes `problem`, and why; where native, its graphs, program, flops and memory, as text."""
    choice = _choice(problem, backend)
    lines = [f"backend: {choice.backend.name} (asked for {backend!r})", f"why: {choice.reason}"]
    if choice.native:
        lines += _explain_plan(choice.backend.plan, problem)  # type: ignore[attr-defined]
    return "\n".join(lines)


def _explain_plan(plan: Any, problem: Problem) -> list[str]:
    lowered = plan.program("fused")
    lines = ["", "support loss:", str(plan.loop.support), "", "query loss:", str(plan.loop.query)]
    for name, section in plan.sections["fused"].items():
        lines += ["", f"section {name}: {len(section.graph.nodes)} nodes", str(section.graph)]
    lines += ["", "program:", lowered.listing(), ""]
    flops = lowered.flops()
    loops = {"inner": problem.steps, "meta": problem.steps}
    total = problem.tasks * sum(f * loops.get(name, 1) for name, f in flops.items())
    lines += [f"flops: {name} {f:.3g} a task and step" for name, f in flops.items()]
    lines += [f"flops of the call: {total:.4g}"]
    state = (problem.steps + 1) * lowered.state_bytes
    worker = f"arena {lowered.arena_bytes} B and state {state} B a worker"
    lines += [f"memory: {worker}, {lowered.result_elements} gradient elements"]
    return lines


# ---- what a plan is keyed by ----------------------------------------------------------------------------------


def plan_key(problem: Problem) -> Any:
    """Everything that can change a plan: shapes, dtypes, who gets a gradient, training flags and plain attributes of
    every module, what the objectives close over, autocast."""
    inner, query = problem.inner_objective, problem.query_objective
    inner_key = function_key(inner)
    return (
        # of the batches the shape of one task: T is no part of a plan
        tuple([(k, t.shape[1:] if k[0] in "sq" else t.shape, t.dtype, t.device) for k, t in problem.leaves.items()]),
        problem.adapted,
        problem.wrt,
        problem.order,
        problem.return_outputs,
        nesting(problem.support_spec),
        nesting(problem.query_spec),
        inner_key,
        inner_key if query is inner else function_key(query),
        function_key(problem.update),
        tuple([(name, b.shape, b.dtype) for name, b in problem.buffers.items()]),
        module_key(problem.model),
        torch.is_autocast_enabled("cpu"),
    )


_INTERNAL = frozenset(nn.Module().__dict__) - {"training"}
_HOOKS = tuple(name for name in nn.Module().__dict__ if name.endswith("_hooks"))
_IMMUTABLE = (type(None), bool, int, float, str, torch.dtype, types.BuiltinFunctionType)


class _Scan:
    """Where a model's flags, plain attributes and hooks lie, and what they were; reading them again costs some 10 µs.

    The same immutable objects mean the same key. What is mutable (lists, other objects) is frozen at each reading.
    """

    def __init__(self, model: nn.Module) -> None:
        dicts = [module.__dict__ for module in model.modules()]
        self.sizes = [(d, len(d)) for d in dicts]
        self.hooks = [d[name] for d in dicts for name in _HOOKS if name in d]
        self.slots = [
            (module.__dict__, name)
            for module in model.modules()
            for name in module.__dict__.keys() - _INTERNAL - getattr(module, "plan_inputs", _INTERNAL)
        ]
        self.values = [d[name] for d, name in self.slots]
        self.mutable = [slot for slot, v in zip(self.slots, self.values, strict=True) if not _immutable(v)]
        self.key = tuple([freeze(v) for v in self.values])

    def same(self) -> bool:
        """Whether every attribute is still the object it was."""
        if any(len(d) != n for d, n in self.sizes):
            return False
        try:
            return all(map(operator.is_, [d[name] for d, name in self.slots], self.values))
        except KeyError:
            return False

    def changing(self) -> tuple[Any, ...]:
        """What can differ although every attribute is the same object."""
        hooks = tuple([(k, tuple(h)) for k, h in enumerate(self.hooks) if h])
        return (hooks, tuple([freeze(d[name]) for d, name in self.mutable]))


def _immutable(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_immutable, value))
    return isinstance(value, _IMMUTABLE) or _of_torch(value)


def _of_torch(f: Any) -> bool:
    """Whether it is a function of torch's own, which closes over nothing that changes."""
    return isinstance(f, types.FunctionType) and (f.__module__ or "").startswith("torch.")


def module_key(model: nn.Module) -> Any:
    """Flags, plain attributes and hooks of every module."""
    scan = _scans.get(model)
    if scan is None or not scan.same():
        scan = _scans[model] = _Scan(model)
    return (scan.key, scan.changing())


def freeze(value: Any) -> Any:
    """A hashable stand-in: plain values by value, containers by content, tensors and objects by identity."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return value
    if isinstance(value, Tensor):
        # One that requires grad is a leaf of the call; any other is held, and read, by the plan
        return (value.requires_grad or id(value), value.shape, value.dtype)
    if isinstance(value, Mapping):
        return tuple((freeze(k), freeze(v)) for k, v in value.items()) if value else ()
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return tuple(freeze(v) for v in value)
    if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
        return function_key(value)
    return id(value)


def function_key(f: Any) -> Any:
    """A function by its code and what it closes over; a partial by its parts; any other callable by its attributes."""
    if isinstance(f, functools.partial):
        return (function_key(f.func), freeze(f.args), freeze(f.keywords))
    if isinstance(f, types.MethodType):
        return (function_key(f.__func__), _attributes(f.__self__))
    if isinstance(f, types.FunctionType):
        if _of_torch(f):
            return f
        return (f.__code__, freeze(f.__defaults__), _cells(f), _globals(f))
    return (type(f), _attributes(f))


def _attributes(owner: Any) -> Any:
    if isinstance(owner, nn.Module):
        return (id(owner), module_key(owner))
    return (id(owner), freeze(getattr(owner, "__dict__", None)))


def _cells(f: types.FunctionType) -> Any:
    def content(cell: Any) -> Any:
        try:
            return freeze(cell.cell_contents)
        except ValueError:
            return None

    return tuple(content(c) for c in f.__closure__ or ())


def _globals(f: types.FunctionType) -> Any:
    scope = f.__globals__
    plain = (bool, int, float, str, Tensor)
    return tuple((n, freeze(scope[n])) for n in f.__code__.co_names if isinstance(scope.get(n), plain))
