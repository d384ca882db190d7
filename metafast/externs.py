"""Tensors that the losses read from outside: closures, attributes, globals.

Those that require grad receive a meta-gradient. Where the losses go native the capture finds them, and the plan is made
of what it wrote down; else one task runs under a dispatch mode that looks at the arguments of every operation. The
result is kept while what the losses can read holds the same objects.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import collector
from .dispatch import known_traces
from .generators import Draws
from .problem import Problem
from .reference import Reference

if TYPE_CHECKING:
    from .capture import Trace

__all__ = ["find_externs"]


@collector.waiting()
def find_externs(problem: Problem) -> list[Tensor]:
    """The tensors that require grad and are read, but are not leaves of `problem`: in the order of first use.

    Runs the first task, once if it can be captured; buffers, attributes of the model and random state are as before
    afterwards.
    A parameter that a closure reads directly, past the model, counts too: there it stands for its initial value.
    """
    traces = _captured(problem)
    return _seen(problem) if traces is None else _met(problem, traces)


def _captured(problem: Problem) -> dict[str, Trace] | None:
    """What a native plan would be made of; kept for it, unless the run has changed what the losses can read."""
    if problem.parameter.device.type != "cpu":
        return None
    try:
        from .native import captured
    except ImportError:  # there is no compiled module
        return None
    reach = problem.reach
    draws = reach.draws() if reach is not None else []
    try:
        traces = captured(problem, known_traces(problem))
    except Exception:  # the run below raises what is the user's, the plan's maker says why it is none
        return None
    if reach is not None and reach.same() and draws == reach.draws():
        problem.traces.update(traces)
    return traces


def _met(problem: Problem, traces: dict[str, Trace]) -> list[Tensor]:
    """The tensors among the externs of those traces, which from now on have the keys of leaves."""
    parts = ("init", "support", "update", "query") if problem.steps else ("query",)
    met = [t for part in parts if part in traces for _, t in traces[part].externs if t.requires_grad]
    found = list({id(t): t for t in met}.values())
    keys = {id(t): f"extern/{index}" for index, t in enumerate(found)}
    if problem.traces:
        problem.traces.update({part: trace.with_externs(keys) for part, trace in traces.items()})
    return found


def _seen(problem: Problem) -> list[Tensor]:
    """The same by one inner step and the query loss of the reference."""
    seen = _Seen()
    one = replace(
        problem,
        leaves={key: _first_task(key, leaf) for key, leaf in problem.leaves.items()},
        tasks=1,
        steps=min(problem.steps, 1),
        wrt=tuple(["param/" + name for name in problem.adapted]),  # the losses run with gradients on
    )
    draws = Draws.of(problem)
    with torch.enable_grad(), seen:
        if problem.query_spec is None:
            Reference().adapt(one, fold=False)
        else:
            Reference().losses(one, fold=False)
    draws.restore()
    return seen.alive()


def _first_task(key: str, leaf: Tensor) -> Tensor:
    return leaf.detach()[:1] if key.startswith(("support/", "query/")) else leaf.detach()


class _Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every argument that requires grad and was there before: a leaf, or made by an older autograd node."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        probe = torch.zeros((), requires_grad=True)
        self._start = _age(probe + 0)
        self._found: dict[int, weakref.ref[Tensor]] = {}
        self._made: dict[int, weakref.ref[Tensor]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No wrapper around `__torch_dispatch__`: it would import all of dynamo at the first operation."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors(*args, *kwargs.values()))
        for tensor in given:
            if tensor.requires_grad and _age(tensor) < self._start:
                self._found.setdefault(id(tensor), weakref.ref(tensor))
        results = func(*args, **kwargs)
        for tensor in _tensors(results):
            if not any(tensor is argument for argument in given):  # what is written in place was there before
                self._made[id(tensor)] = weakref.ref(tensor)
        return results

    def alive(self) -> list[Tensor]:
        """What outlived the run and is not its own: a layer that keeps its last output keeps our leaves alive."""
        tensors = [tensor for tensor in (ref() for ref in self._found.values()) if tensor is not None]
        return [t for t in tensors if (made := self._made.get(id(t))) is None or made() is not t]


def _tensors(*values: Any) -> Iterator[Tensor]:
    for value in values:
        for each in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(each, Tensor):
                yield each


def _age(tensor: Tensor) -> int:
    """The number of the autograd node that made a tensor; leaves count as oldest."""
    return -1 if tensor.grad_fn is None else int(tensor.grad_fn._sequence_nr())
