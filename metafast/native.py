"""The native backend: a plan (captured, differentiated, lowered once) and its replay on the CPU."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metafast import _C, collector
from metafast.binding import MOST_FORMS, Call, Form
from metafast.budget import held, interval, slots
from metafast.capture import Origin, Trace, Unsupported, capture, capture_function
from metafast.cost import Work, work
from metafast.division import Division, Portion, divided
from metafast.errors import LabelError, position
from metafast.generators import Draws
from metafast.graph import Builder, Graph, copy_into
from metafast.lower import Lowered, NotInterleaved, lower, per_task
from metafast.normalise import normalise
from metafast.ops import numel
from metafast.passes import enabled, left_out
from metafast.problem import Objective, Outcome, Problem, hyper_tree
from metafast.profile import Profile, Row
from metafast.reach import CHANGES, Reach
from metafast.recording.first_change import FirstChange
from metafast.recording.users import paths_of
from metafast.reference import located, swapping
from metafast.steps import Steps, steps_of
from metafast.sweep import BACK, SECTIONS, Loop, Section, Store, gradient_section, query_section
from metafast.tasks import require_outputs
from metafast.thin import may_pay, thin
from metafast.unroll import unrolled

MOST_UNROLLED = 1500  # nodes of all steps, whose planning takes time


@dataclass(eq=False)
class Plan:
    """Everything about a problem that does not change from call to call."""

    loop: Loop
    steps: Steps
    externs: dict[str, Tensor]  # tensors found in closures and attributes, by key
    support_stats: Sequence[Any] = ()
    query_stats: Sequence[Any] = ()
    output_spec: Any = None
    output_keys: tuple[str, ...] = ()
    output_dtypes: tuple[torch.dtype, ...] = ()
    programs: dict[tuple[str, int, bool], Lowered] = field(default_factory=dict)
    _queries: dict[str, Section] = field(default_factory=dict)
    _unrolled: dict[tuple[str, int], Lowered | None] = field(default_factory=dict)
    _best: dict[tuple[str, int, int], tuple[Portion, ...]] = field(default_factory=dict)
    _apart: set[tuple[str, int]] = field(default_factory=set)  # modes that can't do so many tasks side by side

    @property
    def dtype(self) -> torch.dtype:
        """That of the programs."""
        return self.steps.dtype

    def best(self, mode: str, tasks: int, steps: int) -> tuple[Portion, ...]:
        """The programs that do so many tasks and steps best, and how many of the tasks each does."""
        found = self._best.get((mode, tasks, steps))
        if found is None:
            if len(self._best) >= MOST_FORMS:
                self._best.clear()
            found = self._best[mode, tasks, steps] = self._divided(mode, tasks, steps)
        return found

    def _divided(self, mode: str, tasks: int, steps: int) -> tuple[Portion, ...]:
        division = self.division(mode, tasks, steps)
        if division == ((1, tasks),) and (whole := self.unrolled(mode, steps)) is not None:
            return (Portion(whole, tasks),)
        found = tuple([Portion(self.program(mode, steps, lanes), count) for lanes, count in division])
        if any((mode, lanes) in self._apart for lanes, _ in division):
            return self.one_by_one(mode, tasks, steps)
        return found

    def division(self, mode: str, tasks: int, steps: int) -> Division:
        """How many of so many tasks to do at once."""
        if not enabled("lanes"):
            return ((1, tasks),)
        state = self.steps.state

        def done() -> Work:
            return work(self.sections(mode, steps), steps, sum(map(numel, state.values())))

        return divided(state, self.dtype.itemsize, tasks, done)

    def unrolled(self, mode: str, steps: int) -> Lowered | None:
        """The program that does all steps in one section, where that pays: where matrices need not be made."""
        if (mode, steps) not in self._unrolled:
            self._unrolled[mode, steps] = self._unroll(mode, steps)
        return self._unrolled[mode, steps]

    @collector.waiting()
    def _unroll(self, mode: str, steps: int) -> Lowered | None:
        sections = {**self.steps.sections(mode in BACK, keeps=False), "query": self._query(mode)}
        nodes = steps * sum(len(sections[name].graph.nodes) for name in ("inner", "meta") if name in sections)
        if not 0 < nodes <= MOST_UNROLLED or not may_pay(sections.values()):
            return None
        if (section := thin(unrolled(sections, steps))) is None:
            return None
        made = lower(section, self.dtype)
        return made if self.spares_memory(made, steps) else None

    def spares_memory(self, made: Lowered, steps: int) -> bool:
        """Whether a program of one section needs no more memory than the fewest states that it does without: so no
        budget of memory is to know of it. What a worker keeps of tensors that tasks share is no state's."""
        fewest = slots(steps, interval(steps, 0))
        return made.arena_bytes <= fewest * sum(map(numel, self.steps.state.values())) * made.itemsize

    def one_by_one(self, mode: str, tasks: int, steps: int) -> tuple[Portion, ...]:
        """The program that does one task after the other."""
        return (Portion(self.program(mode, steps), tasks),)

    @collector.waiting()
    def program(self, mode: str, steps: int, lanes: int = 1) -> Lowered:
        """The native program of one of `MODES`; built at first use.

        One task after the other where `lanes` can't be done at once.
        """
        if (mode, lanes) in self._apart:
            lanes = 1
        key = (mode, lanes, self.keeps(mode, steps, lanes))
        if key not in self.programs:
            try:
                self.programs[key] = self.steps.prepared(mode in BACK, *key[1:]).with_query(self._query(mode))
            except NotInterleaved:
                self._apart.add((mode, lanes))
                return self.program(mode, steps)
        return self.programs[key]

    def sections(self, mode: str, steps: int, lanes: int = 1) -> dict[str, Section]:
        """What that program runs."""
        made = {**self.steps.sections(mode in BACK, self.keeps(mode, steps, lanes)), "query": self._query(mode)}
        return {name: made[name] for name in SECTIONS if name in made}

    def keeps(self, mode: str, steps: int, lanes: int) -> bool:
        """Whether steps keep products for their way back."""
        return self.steps.keeps(mode in BACK, steps, lanes)

    def _query(self, mode: str) -> Section:
        if mode not in self._queries:
            self._queries[mode] = query_section(self.loop, mode)
        return self._queries[mode]


# ---- making a plan --------------------------------------------------------------------------------------------


def make_plan(problem: Problem, traces: Mapping[str, Trace], known: Iterable[Plan] = ()) -> Plan:
    """The plan for a problem that was captured as `traces`. What it has in common with plans that are `known` is
    theirs. Raises Unsupported where something cannot go native."""
    _require_steady(problem, traces)
    support, query = traces["support"], traces.get("query")
    graph = _normalised(support, outputs=False)
    query_graph = _normalised(query, outputs=problem.return_outputs) if query is not None else None
    loop = Loop(
        graph,
        query_graph,
        _normalised(traces["update"]),
        _normalised(traces["init"]),
        problem.adapted,
        {n: tuple(p.shape) for n, p in problem.group("param").items()},
        problem.wrt,
        problem.order,
    )
    steps = steps_of(loop, problem.parameter.dtype, (plan.steps for plan in known))
    plan = Plan(loop, steps, {key: t for trace in traces.values() for key, t in trace.externs})
    plan.support_stats = support.stats
    if query is not None and query_graph is not None:
        plan.query_stats = query.stats
        plan.output_spec = query.output_spec
        plan.output_keys = tuple(k for k in query_graph.outputs if k.startswith("output/"))
        plan.output_dtypes = tuple(query.tensors[query.outputs[k].id].dtype for k in plan.output_keys)
    return plan


def _normalised(trace: Trace, outputs: bool = True) -> Graph:
    """The graph of a trace, written once for all plans that it is part of."""
    key = (outputs, left_out())
    if key not in trace.graphs:
        trace.graphs[key] = normalise(trace, outputs=outputs)
    return trace.graphs[key]


def _require_steady(problem: Problem, traces: Mapping[str, Trace]) -> None:
    """A state is laid out once, for all steps. Raises Unsupported where the update gives it another shape, of which a
    program would read and write the wrong part."""
    before, after = (
        {key: tuple(trace.tensors[ref.id].shape) for key, ref in trace.outputs.items() if key.startswith("state/")}
        for trace in (traces["init"], traces["update"])
    )
    for key, shape in before.items():
        if after[key] != shape:
            reason = f"its state changes shape from step to step, here from {shape} to {after[key]}"
            raise Unsupported("update", type(problem.update).__name__, reason)


def captured(problem: Problem, known: Mapping[str, Trace] | None = None) -> dict[str, Trace]:
    """What a plan is made of: the traces of support, query, init and update, where they are not `known` yet. Those of
    support and query come with eager PyTorch's loss and gradients on the first task. Raises Unsupported."""
    draws, moving = Draws.of(problem), [] if problem.reach is None else problem.reach.draws()
    try:
        traces = _captured(problem, known)
        if problem.reach is None or problem.reach.draws() == moving:
            return traces
        drawn = draws.drawn()
    finally:
        draws.restore()
    raise Unsupported(drawn or "iterator", first_change(problem) or "", CHANGES)


def first_change(problem: Problem) -> Origin | None:
    """The line of the user's that changes what the losses and the update rule read: they are run once more."""
    reach = Reach(problem.model, problem.inner_objective, problem.query_objective, problem.update)
    draws, moving = Draws.of(replace(problem, reach=reach)), reach.draws()
    found = FirstChange(lambda: reach.same() and reach.draws() == moving, paths_of(problem.model))
    try:
        with contextlib.suppress(Exception), found:
            _captured(problem, None)
    finally:
        draws.restore()
    return found.origin


def _captured(problem: Problem, known: Mapping[str, Trace] | None) -> dict[str, Trace]:
    own = set(map(id, problem.group("param").values()))
    if both := [name for name, buffer in problem.buffers.items() if id(buffer) in own]:
        raise Unsupported(both[0], "", "a buffer that is a parameter as well")
    params = {n: p.detach() for n, p in problem.group("param").items()}
    traces = dict(known or {"support": _trace(problem, "support", params)})
    if problem.query_spec is not None:
        traces["query"] = _trace(problem, "query", params)
    if "init" not in traces:
        traces["init"], traces["update"] = _rule_traces(problem, params)
    _refuse_moving_buffers(traces.values())
    return traces


def _refuse_moving_buffers(traces: Collection[Trace]) -> None:
    """A replay folds its passes' statistics at the end of the call, so each pass would read those of before: of a step,
    a query or a task the later ones, and every pass of what comes after its own update."""
    updates = {key for trace in traces for key in trace.updates}
    for trace in traces:
        for key, (op, origin) in trace.reads.items():
            if key in updates:
                raise Unsupported(op, origin, f"reads {key}, which BatchNorm updates in the same call")


def _trace(problem: Problem, part: str, params: Mapping[str, Tensor]) -> Trace:
    leaves = problem.group(part)
    spec = problem.support_spec if part == "support" else problem.query_spec
    objective = problem.inner_objective if part == "support" else problem.query_objective
    if problem.return_outputs and part == "query":
        objective = functools.partial(_with_outputs, objective)
    assert spec is not None
    wanted = [leaf.requires_grad or f"{part}/{name}" in problem.wrt for name, leaf in leaves.items()]
    first = [leaf.detach()[0].requires_grad_(w) for leaf, w in zip(leaves.values(), wanted, strict=True)]
    batch = pytree.tree_unflatten(first, spec)
    keys = [f"{part}/{name}" for name in leaves]
    with located(position(0, 0 if part == "support" else problem.steps, problem.steps), first):
        try:
            return capture(problem.model, objective, params, problem.buffers, batch, keys, _externs(problem))
        except Unsupported as error:  # no error of the user's
            refused = error
        except Exception as error:
            if part == "query" or problem.steps:
                raise
            refused = Unsupported("support", "", f"no step runs its loss, which raises {type(error).__name__}: {error}")
    raise refused


def _with_outputs(objective: Objective, model: nn.Module, batch: Any) -> Any:
    result = objective(model, batch)
    require_outputs(result[1] if isinstance(result, tuple) and len(result) == 2 else None)
    return result


def _externs(problem: Problem) -> dict[str, Tensor]:
    return {k: t for k, t in problem.leaves.items() if k.startswith("extern/")}


def _rule_traces(problem: Problem, params: Mapping[str, Tensor]) -> tuple[Trace, Trace]:
    """The traces of the update rule's init and update; its state becomes "state/<i>"."""
    rule, names = problem.update, problem.adapted
    given: dict[tuple[str, str], Tensor] = {("param", n): params[n] for n in names}
    given |= {("hyper", h): t.detach() for h, t in problem.group("hyper").items()}
    spec: list[Any] = []

    def part(values: Mapping[tuple[str, str], Tensor], role: str) -> dict[str, Tensor]:
        return {n: t for (r, n), t in values.items() if r == role}

    def init(values: Mapping[tuple[str, str], Tensor]) -> dict[str, Tensor]:
        hyper = hyper_tree(part(values, "hyper"))
        with rule.reading(hyper):
            state, nest = _apart(rule.init(part(values, "param"), hyper))
        spec.append(nest)
        return {f"state/{i}": s for i, s in enumerate(state)}

    def step(values: Mapping[tuple[str, str], Tensor]) -> dict[str, Tensor]:
        state = _together(part(values, "state").values(), spec[0])
        hyper = hyper_tree(part(values, "hyper"))
        params, grads, params0 = part(values, "param"), part(values, "grad"), part(values, "param0")
        with rule.reading(hyper):
            made, after = rule.update(params, grads, state, hyper, values["step", "k"], params0)
        flat, nest = _apart(after)
        if nest != spec[0] or set(made) != set(names) or not all(_alike(made[n], params[n]) for n in names):
            reason = "update returns another tree than it was given, or counts in a number that is no tensor"
            raise Unsupported("update", type(rule).__name__, reason)
        return {f"param/{n}": made[n] for n in names} | {f"state/{i}": s for i, s in enumerate(flat)}

    with swapping, torch.no_grad():
        state = init(given)
    spec.clear()
    inputs = {**given, ("step", "k"): torch.zeros((), dtype=problem.parameter.dtype)}
    for n in names:
        # Distinct tensors, so that an identity between inputs cannot be mistaken for one of the rule's
        inputs["grad", n] = torch.linspace(-0.5, 0.75, params[n].numel(), dtype=params[n].dtype).view_as(params[n])
        inputs["param0", n] = params[n].clone()
    inputs |= {("state", name.removeprefix("state/")): s.detach().clone() for name, s in state.items()}
    known = _externs(problem)
    return capture_function(init, given, known=known), capture_function(step, inputs, known=known)


def _alike(made: Any, given: Tensor) -> bool:
    return isinstance(made, Tensor) and made.shape == given.shape and made.dtype == given.dtype


_Nest = tuple[pytree.TreeSpec, tuple[Any, ...]]


def _apart(state: Any) -> tuple[list[Tensor], _Nest]:
    """The tensors of a state, and what stands around them: a nesting, and leaves that are no tensors (None)."""
    leaves, tree = pytree.tree_flatten(state)
    around = tuple(None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)], (tree, around)


def _together(tensors: Iterable[Tensor], nest: _Nest) -> Any:
    tree, rest = nest
    each = iter(tensors)
    return pytree.tree_unflatten([next(each) if r is None else r[0] for r in rest], tree)


# ---- replay ---------------------------------------------------------------------------------------------------


class Native:
    """`Backend` over one plan."""

    name = "native"

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def losses(self, problem: Problem, *, fold: bool) -> Outcome:
        """Losses (and outputs) only."""
        self._require_budget(problem, "outputs" if problem.return_outputs else "fused")
        return self._outcome(problem, self._run(problem, "forward"), fold)

    def meta_gradient(
        self,
        problem: Problem,
        weights: Tensor,
        output_cotangents: Sequence[Tensor | None] | None = None,
        *,
        fold: bool,
    ) -> Outcome:
        """Losses and the gradient of Σ_t weights[t]·loss_t (+ ⟨outputs, cotangents⟩)."""
        extra: dict[str, Tensor] = {}
        if output_cotangents is not None:
            extra = self._output_cotangents(problem, output_cotangents)
        call = self._run(problem, "outputs" if extra else "fused", weights=weights, extra=extra)
        outcome = self._outcome(problem, call, fold)
        outcome.gradients = call.gradients(problem.wrt)
        usual = problem.tensors is not None and weights is problem.settled.get("weights") and not extra
        if usual and "ready" not in problem.settled:
            problem.settled["ready"] = self._ready(call, weights)
        return outcome

    def adapt(self, problem: Problem, *, fold: bool) -> Outcome:
        """The adapted parameters of all tasks."""
        self._require_budget(problem, "adapt_vjp")
        call = self._run(problem, "adapt")
        outcome = self._outcome(problem, call, fold)
        outcome.fast = {n: call.made["fast", n] for n in problem.adapted}
        return outcome

    def adapt_vjp(self, problem: Problem, cotangents: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        """The gradient of Σ ⟨fast, cotangents⟩."""
        extra = {f"fast/{n}": c for n, c in cotangents.items()}
        return self._run(problem, "adapt_vjp", extra=extra).gradients(problem.wrt)

    def profile(self, problem: Problem, weights: Tensor, repeats: int) -> Profile:
        """The fused call instruction by instruction; of each the least time of so many runs."""
        portions = self.plan.best("fused", problem.tasks, problem.steps)
        call = Call(self.plan, Form.of(portions, problem), problem, {})
        rows = []
        for portion, *runs in zip(portions, *[call.profile(weights) for _ in range(repeats)], strict=True):
            among = f", {portion.tasks} tasks" if len(portions) > 1 else ""
            for same in zip(*runs, strict=True):
                section, index, kernel, calls, _ = same[0]
                ins = portion.lowered.code[section][index]
                nbytes = float(calls * sum(numel(a.shape) * a.itemsize for a in ins.operands))
                seconds = min(run[4] for run in same)
                rows.append(Row(section + among, index, kernel, ins.note, calls, seconds, calls * ins.flops, nbytes))
        return Profile(tuple(rows), problem.tasks, problem.steps)

    # -- one call

    def _require_budget(self, problem: Problem, backward: str) -> None:
        """Refuse before the first pass a budget that the backward pass could not keep to."""
        if problem.wrt and problem.memory_budget is not None:
            held(self.plan.best(backward, problem.tasks, problem.steps), problem)

    def _run(
        self,
        problem: Problem,
        mode: str,
        weights: Tensor | None = None,
        extra: Mapping[str, Tensor] | None = None,
    ) -> Call:
        key = (self, mode, torch.get_num_threads())  # which share a budget
        form: Form | None = problem.settled.get(key)
        if form is None:
            form = problem.settled[key] = Form.of(self.plan.best(mode, problem.tasks, problem.steps), problem)
        call = Call(self.plan, form, problem, extra)
        if failed := call.run(weights):
            one_by_one = self.plan.one_by_one(mode, problem.tasks, problem.steps)
            if form.portions != one_by_one:  # which task was it?
                call = Call(self.plan, Form.of(one_by_one, problem), problem, extra)
                failed = call.run(weights)
            if failed:
                call.fail(*failed)
        return call

    def _ready(self, call: Call, weights: Tensor) -> Any:
        """What makes such a call again; None where more belongs to it than losses and sums of gradients."""
        if self.plan.support_stats or self.plan.query_stats or call.problem.reduction == "none":
            return None
        return call.ready(weights)

    def _output_cotangents(self, problem: Problem, given: Sequence[Tensor | None]) -> dict[str, Tensor]:
        assert self.plan.loop.query is not None
        made = {}
        for key, ct in zip(self.plan.output_keys, given, strict=True):
            shape = (problem.tasks, *self.plan.loop.query.outputs[key].shape)
            name = key.replace("output/", "outputs/")
            made[name] = torch.zeros(shape, dtype=self.plan.dtype) if ct is None else ct
        return made

    def _outcome(self, problem: Problem, call: Call, fold: bool) -> Outcome:
        plan = self.plan
        losses, step_losses = call.made.get(("loss", "loss")), call.made.get(("step_loss", "loss"))
        outcome = Outcome(losses=losses, step_losses=step_losses, finite=call.finite, total=call.total)
        if plan.output_keys and problem.return_outputs and ("output", "0") in call.made:
            made = [call.made["output", k.removeprefix("output/")] for k in plan.output_keys]
            flat = [t.to(dtype) for t, dtype in zip(made, plan.output_dtypes, strict=True)]  # truth, counts, labels
            outcome.outputs = pytree.tree_unflatten(flat, plan.output_spec)
        if fold and (plan.support_stats or plan.query_stats):
            call.fold()
        return outcome


# ---- the first-use check --------------------------------------------------------------------------------------


def disagreement(
    plan: Plan, problem: Problem, traces: Mapping[str, Trace], parts: Sequence[str] = ("support", "query")
) -> str | None:
    """Run losses and gradients of the first task, and one step of the update rule, natively, and compare with what
    eager PyTorch gave at capture.

    Returns None where they agree, else what differs. Capture cannot see everything a forward does (a custom backward, a
    hook); this can. float32 is compared loosely: BatchNorm over few samples and kinks move single entries by per cents.
    Where a gradient differs, PyTorch itself is asked how well it knows it: a gradient that is zero but for rounding
    agrees with nobody's.
    """
    tolerance = 1e-6 if plan.dtype == torch.float64 else 5e-2
    for part in parts:
        if part not in traces:
            continue
        trace = traces[part]
        keys = tuple(trace.gradients)
        call = _first_run(plan, problem, part, keys)
        made = {k: g if g is None or not per_task(k) else g[:1] for k, g in call.gradients(keys).items()}
        if found := _loss_differs(trace, float(call.made["loss", "loss"][0]), tolerance):
            return found
        off, size = _distance(made, trace.gradients)
        if off > tolerance * size + 1e-6 and off > _ROUNDINGS * _uncertainty(problem, part, trace):
            return f"the gradient of the first task differs from PyTorch's by {off / (size or 1.0):.2g} of its norm"
    return next((found for part in ("init", "update") if (found := _rule_differs(plan, traces[part], part))), None)


def _rule_differs(plan: Plan, trace: Trace, part: str) -> str | None:
    """Compare what the native rule makes of the values that it was captured with."""
    if not trace.values:
        return None  # compared before, for another plan
    graph = plan.loop.init if part == "init" else plan.loop.update
    made = evaluate(graph, {(i.role, i.name): trace.values[f"{i.role}/{i.name}"] for i in graph.inputs})
    wanted = {name: trace.values[f"made/{name}"] for name in graph.outputs}
    off, size = _distance(made, wanted)
    if off <= (1e-9 if plan.dtype == torch.float64 else 1e-4) * size:
        return None
    return f"{part} of the update rule differs from PyTorch's by {off / (size or 1.0):.2g} of its norm"


def _first_run(plan: Plan, problem: Problem, part: str, keys: Sequence[str]) -> Call:
    """Loss and gradient of the first task: of the query by the program of sections that the call itself will run,
    without a step, where that gives all of them; a program of one section comes from those, and has no query alone.
    Of several tasks at once the others are the same one, and weigh nothing."""
    wanted, lowered = problem.wrt, None
    if part == "query" and problem.wrt and not problem.return_outputs and set(keys) <= set(problem.wrt):
        lowered = plan.program("fused", problem.steps, plan.division("fused", problem.tasks, problem.steps)[0][0])
    if lowered is None:
        graph = plan.loop.query if part == "query" else plan.loop.support
        assert graph is not None
        wanted, lowered = tuple(keys), lower(gradient_section(graph, tuple(keys)), plan.dtype)
    first = replace(_first_task(problem, lowered.lanes), steps=0, memory_budget=None, wrt=wanted, reduction="none")
    call = Call(plan, Form.of((Portion(lowered, lowered.lanes),), first), first)
    only = torch.arange(lowered.lanes) == 0
    if failed := call.run(only.to(plan.dtype)):
        call.fail(*failed)
    return call


_ROUNDINGS = 10.0  # of one rounding of every parameter: what two right programs may differ by
_JITTER = {torch.float32: 2.0**-22, torch.float64: 2.0**-51}  # a few units in the last place


def _uncertainty(problem: Problem, part: str, trace: Trace) -> float:
    """How far PyTorch's own gradient moves where every parameter moves by a rounding."""
    random = torch.Generator().manual_seed(0)
    moved = {}
    for name, p in problem.group("param").items():
        signs = torch.randint(0, 2, p.shape, generator=random).to(p.dtype) * 2 - 1
        moved[name] = p.detach() * (1 + _JITTER[p.dtype] * signs) if p.dtype in _JITTER else p.detach()
    return _distance(_trace(problem, part, moved).gradients, trace.gradients)[0]


def _first_task(problem: Problem, times: int) -> Problem:
    """As many tasks, all of them the first."""
    leaves = {k: t[:1].expand(times, *t.shape[1:]) if per_task(k) else t for k, t in problem.leaves.items()}
    return replace(problem, leaves=leaves, tasks=times)


def _loss_differs(trace: Trace, loss: float, tolerance: float) -> str | None:
    assert trace.loss is not None
    expected = float(trace.loss.detach())
    if math.isfinite(expected):
        same = abs(loss - expected) <= tolerance * max(1.0, abs(expected))
    else:
        same = loss == expected or (math.isnan(loss) and math.isnan(expected))
    return None if same else f"the loss of the first task is {loss:.6g} natively, {expected:.6g} in PyTorch"


def _distance(grads: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> tuple[float, float]:
    """The norm of the difference of two gradients, and that of the second, over what is finite in both; the first is
    infinite where not the same entries are."""
    wanted = {key: want for key, want in expected.items() if want is not None}
    if not wanted:
        return 0.0, 0.0
    b = np.concatenate([_numbers(want) for want in wanted.values()])
    given = [(grads.get(key), want) for key, want in wanted.items()]
    a = np.concatenate([np.zeros(want.numel()) if got is None else _numbers(got) for got, want in given])
    finite = np.isfinite(b)
    if not np.array_equal(finite, np.isfinite(a)):
        return math.inf, 1.0
    if not finite.all():
        a, b = a[finite], b[finite]
    scale = float(np.abs(b).max(initial=0.0)) or 1.0
    return scale * _norm((a - b) / scale), scale * _norm(b / scale)


def _norm(numbers: Any) -> float:
    """Not by `np.linalg.norm`: that asks BLAS, whose threads, once awake, spin beside what comes next."""
    return math.sqrt(float(np.square(numbers).sum()))


def _numbers(tensor: Tensor) -> Any:
    """In a row, in double precision; by NumPy, which wakes no threads."""
    return tensor.detach().resolve_neg().numpy().reshape(-1).astype(np.float64)


def evaluate(graph: Graph, values: Mapping[tuple[str, str], Tensor]) -> dict[str, Tensor]:
    """Run one graph natively, once: what the tests of single ops call.

    **Arguments:** `values` maps (role, name) to a tensor; floating-point ones share the program's dtype. **Returns**
    the outputs by name.
    """
    b = Builder()
    env = copy_into(b, graph, lambda i: b.input("leaf", f"{i.role}:{i.name}", i.value.shape, i.value.dtype))
    outputs = {name: env[v] for name, v in graph.outputs.items()}
    section = Section(b.finish(outputs), tuple(Store(name, "output", name) for name in outputs))
    dtype = next((t.dtype for t in values.values() if t.is_floating_point()), torch.float64)
    lowered = lower(section, dtype)
    tensors = {f"{r}:{n}": t.contiguous() for (r, n), t in values.items()}
    made: dict[str, Tensor] = {}
    table = np.zeros((len(lowered.externals), 3), dtype=np.int64)
    for j, e in enumerate(lowered.externals):
        if e.kind != "leaf":
            made[e.name] = torch.empty(e.shape, dtype=torch.int32 if e.dtype == "index" else dtype)
        table[j, 0] = (tensors if e.kind == "leaf" else made)[e.name].data_ptr()
    status = _C.run(lowered.program, table, T=1, steps=0, threads=1)
    if status[0]:
        raise LabelError(f"kernel failed with status {status}")
    return made
