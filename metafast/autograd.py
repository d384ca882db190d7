"""A call of the inner loop, and the ways it takes into autograd.

A `Call` knows how to compute its results and, later, its gradients. It takes one of three ways into autograd:

- nothing wants a gradient: it just runs;
- eagerly: `_Eager`, an autograd function around it;
- under a torch.func transform: `Transformed`, a function with a vmap rule around the registered operation
  `metafast::replay`, which in turn has autograd, vmap and fake rules of its own (both in `registered.py`). No order of
  transforms is then silently wrong: each is right or raises.

The registered operations take the leaves as a list and the call as a number; numbers are looked up in a weak registry,
and the graph holds the call, so a call lives exactly as long as something may still ask for its gradient.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import dispatch
from .batchnorm import copied
from .errors import BackendError, DoubleBackwardError, InputChangedError, TransformError, message
from .generators import Draws
from .problem import Backend, Outcome, Problem
from .reach import Reach
from .transforms import outside_compile, tracing, transformed

__all__ = ["AdaptCall", "Call", "FusedCall", "Once", "launch"]
__all__ += ["apply", "find_call", "once", "saved_by", "scaled"]


Check = Callable[[Outcome, Problem], None]
Weights = Callable[[Problem], Tensor]


class Surroundings:
    """What a replay needs to see as the first pass saw it: random state, autocast, buffers."""

    def __init__(self, problem: Problem) -> None:
        device = problem.parameter.device
        self._cuda = [device] if device.type == "cuda" else []
        kind = device.type
        self._autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self._cpu_state = torch.get_rng_state()
        self._cuda_states = [torch.cuda.get_rng_state(d) for d in self._cuda]
        self.buffers = copied(problem.buffers)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Draw the same random numbers as the first pass, leave the generators as they are."""
        with torch.random.fork_rng(self._cuda), self.precision():
            self.rewind()
            yield

    def rewind(self) -> None:
        """Set the generators to where the first pass began."""
        torch.set_rng_state(self._cpu_state)
        for device, state in zip(self._cuda, self._cuda_states, strict=True):
            torch.cuda.set_rng_state(state, device)

    def precision(self) -> torch.autocast:
        """The autocast setting of the first pass."""
        kind, dtype, enabled = self._autocast
        return torch.autocast(kind, dtype=dtype, enabled=enabled)


def _read(problem: Problem) -> tuple[Any, list[int]] | None:
    """What the losses can read besides their arguments, as it is now, and how often each tensor in it was written."""
    reach = problem.reach
    if reach is None:
        return None
    if not reach.same():
        reach = Reach(problem.model, problem.inner_objective, problem.query_objective, problem.update)
    return reach.key, reach.versions()


class Call(ABC):
    """One call: a problem, its backend, and what its backward pass needs.

    The first `differentiable` results of `forward` carry a graph. A call that is `ready` appends the gradients of its
    first result, which backward only scales; otherwise backward replays with the true cotangents.
    """

    differentiable = 1
    surroundings: Surroundings | None = None
    draws: Draws | None = None  # where the generators stood before the first pass, if its backend may have drawn
    read: tuple[Any, list[int]] | None = None

    def __init__(self, problem: Problem, backend: str, check: Check, *, ready: bool = False) -> None:
        self.problem = problem
        self.asked = backend
        self.check = check
        self.ready = ready

    def backend(self, problem: Problem) -> Backend:
        """The backend for `problem`: asked for only when it runs, on tensors that no transform wraps."""
        return dispatch.choose(problem, self.asked)

    def remember(self) -> None:
        """Note what a replay must find again; to be called before the first pass."""
        if self.surroundings is None:
            self.surroundings = Surroundings(self.problem)

    def first_pass(self, problem: Problem) -> list[Tensor]:
        """`forward`, and a note of what a replay reads that is no argument, as the pass left it."""
        results = self.forward(problem)
        if not self.ready:
            self.read = _read(problem)
        return results

    @abstractmethod
    def forward(self, problem: Problem) -> list[Tensor]:
        """The results: differentiable ones, then, where `ready`, gradients in the order of `problem.wrt`."""

    @abstractmethod
    def replay(self, problem: Problem, cotangents: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
        """The gradients for the given cotangents of the differentiable results."""

    @abstractmethod
    def fake(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Empty tensors in the shapes of the results."""

    def backward(self, problem: Problem, cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Replay under the surroundings of the first pass; parallel to `problem.wrt`."""
        if all(cotangent is None for cotangent in cotangents):
            return [None] * len(problem.wrt)
        assert self.surroundings is not None
        if self.read != _read(problem):
            raise InputChangedError(
                "backward of InnerLoop: got another model, or something else that the losses read (an attribute, a "
                "closure, a mode), than in the forward pass, expected it unchanged; call backward first: it runs the "
                "tasks again"
            )
        drawing = contextlib.nullcontext() if self.draws is None else self.draws.again()
        with self.surroundings.again(), drawing, torch.no_grad():
            gradients = self.replay(replace(problem, buffers=self.surroundings.buffers), cotangents)
        return [gradients[key] for key in problem.wrt]

    def wanted(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """The leaves whose gradient is wanted, out of all of them."""
        wrt = frozenset(self.problem.wrt)
        return [leaf for key, leaf in zip(self.problem.leaves, leaves, strict=True) if key in wrt]


class FusedCall(Call):
    """The meta-loss: inner loop, query loss and, for "mean" and "sum", the meta-gradient in one pass over the tasks.

    Results: the loss, then the flattened outputs if the problem returns them.
    """

    def __init__(self, problem: Problem, backend: str, check: Check, *, ready: bool, weights: Weights) -> None:
        super().__init__(problem, backend, check, ready=ready)
        self.weights = weights
        self.outputs_spec: pytree.TreeSpec | None = None
        self._outputs_like: list[Tensor] = []

    def forward(self, problem: Problem) -> list[Tensor]:
        if self.ready and (made := problem.again()) is not None:
            return [made[0], *made[1]]
        backend = self.backend(problem)
        if self.ready:
            outcome = backend.meta_gradient(problem, self.weights(problem), fold=True)
        else:
            outcome = backend.losses(problem, fold=True)
        self.draws = outcome.draws
        self.check(outcome, problem)
        results = [outcome.reduced(problem.reduction)]
        if problem.return_outputs:
            outputs, self.outputs_spec = pytree.tree_flatten(outcome.outputs)
            self._outputs_like = outputs
            self.differentiable = 1 + len(outputs)
            results += outputs
        return results + (outcome.filled(self.problem) if self.ready else [])

    def replay(self, problem: Problem, cotangents: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
        seed, *outputs = cotangents
        weights = self.weights(problem)
        weights = torch.zeros_like(weights) if seed is None else weights * seed
        outcome = self.backend(problem).meta_gradient(problem, weights, outputs or None, fold=False)
        assert outcome.gradients is not None
        return outcome.gradients

    def fake(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        like = leaves[0]
        results = [like.new_empty((self.problem.tasks,) if self.problem.reduction == "none" else ())]
        results += [like.new_empty(t.shape, dtype=t.dtype) for t in self._outputs_like]
        return results + ([t.new_empty(t.shape) for t in self.wanted(leaves)] if self.ready else [])


class AdaptCall(Call):
    """The adapted parameters of all tasks, one result each, `(T, *shape)`, in the order of `problem.adapted`."""

    def __init__(self, problem: Problem, backend: str, check: Check) -> None:
        super().__init__(problem, backend, check)
        self.differentiable = len(problem.adapted)

    def forward(self, problem: Problem) -> list[Tensor]:
        outcome = self.backend(problem).adapt(problem, fold=True)
        self.draws = outcome.draws
        self.check(outcome, problem)
        assert outcome.fast is not None
        return [outcome.fast[name] for name in problem.adapted]

    def replay(self, problem: Problem, cotangents: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
        given = {}
        for name, cotangent in zip(problem.adapted, cotangents, strict=True):
            leaf = problem.leaves["param/" + name]
            given[name] = leaf.new_zeros((problem.tasks, *leaf.shape)) if cotangent is None else cotangent
        return self.backend(problem).adapt_vjp(problem, given)

    def fake(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        own = dict(zip(self.problem.leaves, leaves, strict=True))
        params = [own["param/" + name] for name in self.problem.adapted]
        return [p.new_empty((self.problem.tasks, *p.shape)) for p in params]


class Function(torch.autograd.Function):
    """An autograd function without a forward-mode rule that says so."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        place, got = "InnerLoop under forward-mode autograd (jvp, jacfwd, hessian)", "a tangent of its arguments"
        way_out = "use torch.func.grad, vjp or jacrev, or write the loop in PyTorch"
        raise TransformError(message(place, got, "reverse mode", way_out))


def apply(function: type[torch.autograd.Function], *args: Any) -> tuple[Any, ...]:
    """`function.apply`, with a type."""
    results: tuple[Any, ...] = function.apply(*args)  # type: ignore[no-untyped-call]
    return results


def launch(call: Call) -> list[Tensor]:
    """Run a call on the way that autograd needs here; returns its differentiable results."""
    problem = call.problem
    if transformed():
        number = _register(call)
        from .registered import Transformed

        return list(apply(Transformed, number, *problem.leaves.values()))[: call.differentiable]
    if not (problem.wrt and torch.is_grad_enabled()) and not tracing():
        return call.forward(problem)
    if not call.ready:
        call.remember()
    return list(apply(_Eager, call, *[problem.leaves[key] for key in problem.wrt]))


# Eager


class _Eager(Function):
    """The quick way: no registered operation between autograd and the backend."""

    @staticmethod
    def forward(ctx: Any, call: Call, *wanted: Tensor) -> tuple[Tensor, ...]:
        results = call.first_pass(call.problem)
        n = call.differentiable
        ctx.call = call
        if not call.ready:
            ctx.memory = _memory(call.problem)
        # All leaves are saved, also those that take no gradient: autograd notices if one is changed in place.
        ctx.save_for_backward(*call.problem.leaves.values(), *results[n:])
        ctx.set_materialize_grads(False)
        return tuple(results[:n])

    @staticmethod
    @outside_compile
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        _require_single(cotangents)
        call: Call = ctx.call
        count = len(call.problem.leaves)
        saved = saved_by(ctx)
        if not call.ready:
            _require_same(ctx.memory, _memory(call.problem))
        if call.ready and _is_one(cotangents[0]):
            grads: list[Tensor | None] = list(saved[count:])
        else:
            with torch.no_grad():
                grads = scaled(saved[count:], cotangents[0]) if call.ready else call.backward(call.problem, cotangents)
        if torch.is_grad_enabled():  # create_graph: whoever differentiates these shall hear of it
            grads = once(grads, [*call.wanted(saved[:count]), *(c for c in cotangents if c is not None)])
        return (None, *grads)


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _memory(problem: Problem) -> dict[str, tuple[Any, ...]]:
    """What autograd's count of in-place writes does not see of the leaves, `.data` being written or replaced: where
    each lies, and but for the batches, which no optimizer writes to, the sum of its bits. Keeps that memory from being
    given to others."""
    found = {}
    for key, leaf in problem.leaves.items():
        t = leaf.detach()
        if t.layout is torch.strided:  # else it has no memory of its own to look at
            bits = None if key[0] in "sq" else _sum_of_bits(t)
            found[key] = (t.data_ptr(), t.shape, t.stride(), bits, t.untyped_storage())
    return found


def _sum_of_bits(tensor: Tensor) -> int | None:
    if tensor.is_complex():
        return None
    return int(tensor.resolve_neg().reshape(-1).view(_BITS[tensor.element_size()]).sum())


def _require_same(before: dict[str, tuple[Any, ...]], now: dict[str, tuple[Any, ...]]) -> None:
    changed = [key for key, (*facts, _) in before.items() if facts != [*now.get(key, ())[:-1]]]
    if changed:
        raise InputChangedError(
            f"backward of InnerLoop: got {changed[0].replace('/', ' ', 1)} with other memory or values behind `.data` "
            "than in the forward pass, expected it unchanged; call backward first: it runs the tasks again"
        )


def _is_one(seed: Tensor | None) -> bool:
    """Whether the loss was what was differentiated; asking a GPU would take longer than to multiply."""
    return seed is not None and seed.is_cpu and seed.item() == 1.0


def _require_single(cotangents: Sequence[Tensor | None]) -> None:
    """Values of the several cotangents that PyTorch's own vmap runs a backward of once cannot be read. A call that is
    ready could scale with them, but what it says of a second differentiation would be lost on the way."""
    if any([c is not None and torch._C._functorch.is_legacy_batchedtensor(c) for c in cotangents]):
        place = "backward of InnerLoop under is_grads_batched=True (or vectorize=True)"
        way_out = "call torch.autograd.grad once for each, or use torch.func.jacrev"
        raise TransformError(message(place, "several cotangents in one", "one at a time", way_out))


class Once(Function):
    """Passes gradients on; its own backward raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        raise DoubleBackwardError(
            "backward of InnerLoop: got a second differentiation of the meta-gradient, expected one; order=2 needs no "
            "create_graph (the support gradient is differentiated anyway), for higher orders write the loop in PyTorch"
        )


def once(grads: Sequence[Tensor | None], read: Sequence[Tensor]) -> list[Tensor | None]:
    """The gradients, which can't be differentiated again: whoever tries, in what they were made from, hears of it."""
    given = [g for g in grads if g is not None]
    passed = iter(apply(Once, len(given), *given, *read) if given else ())
    return [None if g is None else next(passed) for g in grads]


def scaled(grads: Sequence[Tensor], seed: Tensor | None) -> list[Tensor | None]:
    """The gradients of a ready call for the true cotangent of its loss."""
    if seed is None:
        return [None] * len(grads)
    return [g * seed for g in grads]


def saved_by(ctx: Any) -> tuple[Tensor, ...]:
    """What the forward saved. Raises `InputChangedError` where it was changed since."""
    try:
        saved: tuple[Tensor, ...] = ctx.saved_tensors
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        raise InputChangedError(
            "backward of InnerLoop: got a parameter, hyper-parameter or batch tensor that was changed in place after "
            f"the forward pass, expected it unchanged; call backward first, or change a clone ({error})"
        ) from error
    return saved


# Registered


_calls: weakref.WeakValueDictionary[int, Call] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def _register(call: Call) -> int:
    """A number for `metafast::replay` to know the call by."""
    from . import registered  # noqa: F401   made with the first transform: it takes milliseconds

    number = next(_numbers)
    _calls[number] = call
    return number


def find_call(number: int) -> Call:
    """The call of that number. Raises `BackendError` where it is gone."""
    try:
        return _calls[number]
    except KeyError:
        raise BackendError(
            f"metafast::replay: got call {number}, which is gone, expected one whose graph is alive; a traced or "
            "exported graph cannot outlive the call it was made from"
        ) from None
