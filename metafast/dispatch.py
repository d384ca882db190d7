"""Which backend takes a problem: the plan cache, the first-use check, the fallback and its warning."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from metafast import collector
from metafast.errors import BackendError, FallbackWarning, MetafastError, calling, message, warn
from metafast.problem import Backend, Problem
from metafast.reach import CHANGES, Reach
from metafast.reference import Reference
from metafast.settings import settings
from metafast.tasks import nesting

if TYPE_CHECKING:
    from metafast.capture import Trace
    from metafast.division import Portion
    from metafast.profile import Profile

__all__ = ["choose", "explain", "known_traces", "profile"]

MOST_PLANS = 64  # a model keeps so many, the oldest go first


@dataclass(frozen=True)
class Steps:
    """What was captured of all but the query, and what held then. The reach, which may hold the model, may go."""

    key: Any
    reach: weakref.ref[Reach]
    traces: Mapping[str, Trace]


@dataclass(frozen=True)
class Choice:
    """A backend and why it was chosen."""

    backend: Backend
    reason: str
    native: bool
    restless: bool = False  # the forward changes its module: at the next call it is another one
    support: Any = None  # what the support half of the plan is keyed by
    steps: Steps | None = None


_plans: weakref.WeakKeyDictionary[nn.Module, dict[Any, Choice]] = weakref.WeakKeyDictionary()


def choose(problem: Problem, backend: str) -> Backend:
    """The backend for `problem`: `backend` is "auto", "native", "cuda" or "torch".

    A problem that cannot go native takes the PyTorch reference under "auto", with one FallbackWarning a plan; under
    "native" it raises BackendError.
    """
    return _choice(problem, backend).backend


def _choice(problem: Problem, backend: str) -> Choice:
    key = (backend, settings())
    found: Choice | None = problem.settled.get(key)
    if found is None:
        try:
            found = _sought(problem, backend)
        finally:
            problem.traces.clear()
        if problem.reach is not None and not problem.reach.same():  # a cache is full now, say
            problem.settle_apart()
        problem.settled[key] = found
    return found


def _sought(problem: Problem, backend: str) -> Choice:
    if backend == "torch":
        return Choice(Reference(), 'backend="torch" was asked for', False)
    if backend == "cuda":
        raise BackendError(
            message("InnerLoop(backend=...)", "'cuda'", "one that is built in", 'use backend="auto" or "native"')
        )
    plans = _plans.setdefault(problem.model, {})
    key = plan_key(problem)
    found = plans.get(key) or plans.get(key[:-1])
    if found is None:
        if len(plans) >= MOST_PLANS:  # an attribute that changes at every call makes a plan every time
            del plans[next(iter(plans))]
        found, key = _settled(problem)
        known = found.restless and any(c.restless and k[:-1] == key[:-1] for k, c in plans.items())
        plans[key[:-1] if known else key] = found  # twice is always: a counter, no cache that is filled once
        if not found.native and backend == "auto" and not known:
            warn(f"metafast falls back to PyTorch: {found.reason}", FallbackWarning)
    if backend == "native" and not found.native:
        raise BackendError(
            message("InnerLoop(backend='native')", found.reason, "a problem that goes native", 'use backend="auto"')
        )
    return found


@collector.waiting()
def _settled(problem: Problem) -> tuple[Choice, tuple[Any, ...]]:
    """A choice and its key. What running the losses changes of what they read (a counter, a random generator) a plan
    would freeze; what they change once only (a cache that is filled) it holds as it is afterwards."""
    for _ in range(2):
        reach = _reach(problem)
        draws = reach.draws()
        choice = _plan(problem)
        if reach.same() and draws == reach.draws():
            return choice, plan_key(problem)
        problem = replace(problem, reach=None)
    if choice.native:
        from metafast.native import Unsupported, first_change

        choice = Choice(Reference(), str(Unsupported("state", first_change(problem) or "", CHANGES)), False)
    return replace(choice, restless=False), plan_key(problem)[:-1]


def _plan(problem: Problem) -> Choice:
    if (refused := _reach(problem).refused) is not None:
        return Choice(Reference(), f"the losses can read {refused}, which cannot be looked through at each call", False)
    device = problem.parameter.device
    if device.type != "cpu":
        return Choice(Reference(), f"the parameters are on {device}, the native backend runs on the CPU", False)
    try:
        from metafast import _C  # noqa: F401
    except ImportError as error:
        return Choice(Reference(), f"the compiled module cannot be imported ({error})", False)
    from metafast.capture import Origin, Unsupported
    from metafast.native import Native, captured, disagreement, make_plan

    support = plan_key(_support_half(problem))
    others = [c for c in _plans.get(problem.model, {}).values() if c.native]
    checked = any(c.support == support for c in others)
    try:
        traces = dict(problem.traces) or captured(problem, known_traces(problem))
        if not checked and traces["support"].loss is None:
            traces = captured(problem)
        plan = make_plan(problem, traces, [c.backend.plan for c in others])  # type: ignore[attr-defined]
        if not others:
            _tidy(traces)
        differs = disagreement(plan, problem, traces, ("query",) if checked else ("support", "query"))
    except Unsupported as error:
        frame = calling()[0]
        call = Origin("", frame.f_code, frame.f_lineno)
        reason = str(error) if error.located else f"{error} (called from {call})"
        return Choice(Reference(), reason, False, restless=error.op == "attribute")
    except (MetafastError, MemoryError):  # what is wrong with the call, or with the machine
        raise
    except Exception as error:  # a defect of ours costs speed, not the answer; what the user's code raises, eager shows
        return Choice(Reference(), f"making the plan failed ({type(error).__name__}: {error}); please report it", False)
    if differs is not None:
        return Choice(Reference(), f"capture lost something: {differs}", False)
    reason = "every op has a native kernel; the first task agrees with PyTorch's autograd"
    steps = {part: trace.written() for part, trace in traces.items() if part != "query"}
    key = plan_key(_captured_half(problem))
    return Choice(Native(plan), reason, True, support=support, steps=Steps(key, weakref.ref(_reach(problem)), steps))


def known_traces(problem: Problem) -> dict[str, Trace]:
    """What a plan of the same model, which is told apart by its query alone, has captured of all else; or nothing."""
    found = [c.steps for c in _plans.get(problem.model, {}).values() if c.steps is not None]
    if found:
        key, reach = plan_key(_captured_half(problem)), _reach(problem)
        for steps in found:
            before = steps.reach()
            if before is not None and steps.key == key and (before is reach or reach.finds(before)):
                return dict(steps.traces)
    return {}


def _tidy(traces: Mapping[str, Trace]) -> None:
    """What PyTorch's eager run of the losses took is not to add to what a replay takes, of which the check's is the
    first. Once a model: for the next plan it would have to be asked for again, page by page."""
    from metafast import _C

    for trace in traces.values():
        trace.gradients  # noqa: B018 (frees the run's tensors)
    _C.return_free_pages()


def explain(problem: Problem, backend: str) -> str:
    """Which backend takes `problem`, and why; where native, its graphs, program, flops and memory, as text."""
    choice = _choice(problem, backend)
    lines = [f"backend: {choice.backend.name} (asked for {backend!r})", f"why: {choice.reason}"]
    if choice.native:
        lines += _explain_plan(choice.backend.plan, problem)  # type: ignore[attr-defined]
    return "\n".join(lines)


def profile(problem: Problem, backend: str, weights: Tensor, repeats: int) -> Profile:
    """Where the time of the call goes. Raises BackendError where `problem` does not go native."""
    choice = _choice(problem, backend)
    if not choice.native:
        way_out = "use torch.profiler for the PyTorch reference"
        raise BackendError(message("InnerLoop.profile", choice.reason, "a problem that goes native", way_out))
    found: Profile = choice.backend.profile(problem, weights, repeats)  # type: ignore[attr-defined]
    return found


def _explain_plan(plan: Any, problem: Problem) -> list[str]:
    from metafast.budget import held

    portions = plan.best("fused", problem.tasks, problem.steps)
    lines = ["", "support loss:", str(plan.loop.support), "", "query loss:", str(plan.loop.query)]
    lines += [line for portion in portions for line in _explain_portion(plan, problem, portion)]
    lines += [f"flops of the call: {sum(_flops(portion, problem.steps) for portion in portions):.4g}"]
    kept = any(plan.keeps("fused", problem.steps, portion.lowered.lanes) for portion in portions)
    products = ", with products" if kept else ""
    lines += [f"states: {held(portions, problem)}{products} (memory_budget={problem.memory_budget})"]
    return lines


def _explain_portion(plan: Any, problem: Problem, portion: Portion) -> list[str]:
    """What one program does of the tasks, as text."""
    lowered = portion.lowered
    once = "one by one" if lowered.lanes == 1 else f"{lowered.lanes} tasks side by side"
    lines = ["", f"{portion.tasks} of {problem.tasks} tasks: {once}"]
    for name, section in plan.sections("fused", problem.steps, lowered.lanes).items():
        lines += ["", f"section {name}: {len(section.graph.nodes)} nodes", str(section.graph)]
    lines += ["", "program:", lowered.listing(), ""]
    lines += [f"flops: {name} {f:.3g} a run" for name, f in lowered.flops().items()]
    worker = f"arena {lowered.arena_bytes} B and kept of shared tensors {lowered.program.kept_bytes()} B a worker"
    return [*lines, f"memory: {worker}, sums {lowered.sum_bytes} B a group"]


def _flops(portion: Portion, steps: int) -> float:
    loops = {"inner": steps, "meta": steps}
    return portion.blocks * sum(f * loops.get(name, 1) for name, f in portion.lowered.flops().items())


# ---- what a plan is keyed by ----------------------------------------------------------------------------------


_PLAIN = (Tensor, nn.Parameter)


def plan_key(problem: Problem) -> tuple[Any, ...]:
    """Everything that can change a plan: shapes, dtypes, who gets a gradient, what the losses can read besides their
    arguments (flags and attributes of modules, closures, globals, hooks), settings of the process."""
    reach = _reach(problem)
    return (
        # of the batches the shape of one task: T is no part of a plan
        tuple([(k, t.shape[1:] if k[0] in "sq" else t.shape, t.dtype, t.device) for k, t in problem.leaves.items()]),
        tuple([type(t) for t in problem.leaves.values() if type(t) not in _PLAIN]),  # a subclass may compute otherwise
        problem.adapted,
        problem.wrt,
        problem.order,
        problem.steps > 0,  # what adapts is read before what does not, and tensors found outside are numbered by that
        problem.return_outputs,
        nesting(problem.support_spec),
        nesting(problem.query_spec),
        tuple([(name, b.shape, b.dtype) for name, b in problem.buffers.items()]),
        settings(),
        reach.code,
        reach.key,
    )


def _support_half(problem: Problem) -> Problem:
    """The problem without its query: what one plan has checked of that holds for every other."""
    leaves = {key: leaf for key, leaf in problem.leaves.items() if not key.startswith("query/")}
    return replace(problem, leaves=leaves, query_spec=None, return_outputs=False)


def _captured_half(problem: Problem) -> Problem:
    """What of the support half is known before the losses have run: who wants a gradient shows in the leaves."""
    half = _support_half(problem)
    leaves = {key: leaf for key, leaf in half.leaves.items() if not key.startswith("extern/")}
    wrt = tuple([key for key, leaf in leaves.items() if leaf.requires_grad or key in half.wrt])
    return replace(half, leaves=leaves, wrt=wrt)


def _reach(problem: Problem) -> Reach:
    if problem.reach is not None:
        return problem.reach
    return Reach(problem.model, problem.inner_objective, problem.query_objective, problem.update)
