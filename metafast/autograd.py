"""One pair of registered operations, and the autograd functions around them, for every way out of the inner loop.

A `Call` knows how to compute its results and, later, its gradients. It takes one of three ways into autograd:

- nothing wants a gradient: it just runs;
- eagerly: `_Eager`, an autograd function around it;
- under a torch.func transform: `_Transformed`, a function with a vmap rule around the registered operation
  `metafast::replay`, which in turn has autograd, vmap and fake rules of its own. No order of transforms is then
  silently wrong: each is right or raises.

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
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from . import dispatch
from .batchnorm import copied
from .errors import BackendError, DoubleBackwardError, InputChangedError, TransformError, message
from .externs import find_externs
from .problem import Backend, Outcome, Problem
from .reach import Reach
from .reference import swapping
from .transforms import outside_compile, tracing, transformed

__all__ = ["AdaptCall", "Call", "FusedCall", "launch"]


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
        with self.surroundings.again(), torch.no_grad():
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

    def __init__(
        self, problem: Problem, backend: str, check: Check, *, ready: bool, reduction: str, weights: Weights
    ) -> None:
        super().__init__(problem, backend, check, ready=ready)
        self.reduction = reduction
        self.weights = weights
        self.outputs_spec: pytree.TreeSpec | None = None
        self._outputs_like: list[Tensor] = []

    def forward(self, problem: Problem) -> list[Tensor]:
        backend = self.backend(problem)
        if self.ready:
            outcome = backend.meta_gradient(problem, self.weights(problem), fold=True)
        else:
            outcome = backend.losses(problem, fold=True)
        self.check(outcome, problem)
        assert outcome.losses is not None
        results = [outcome.losses if self.reduction == "none" else self.reduced(outcome.losses)]
        if problem.return_outputs:
            outputs, self.outputs_spec = pytree.tree_flatten(outcome.outputs)
            self._outputs_like = outputs
            self.differentiable = 1 + len(outputs)
            results += outputs
        return results + (self.gradients(outcome) if self.ready else [])

    def reduced(self, losses: Tensor) -> Tensor:
        """The losses `(T,)` as one number."""
        return losses.mean() if self.reduction == "mean" else losses.sum()

    def gradients(self, outcome: Outcome) -> list[Tensor]:
        """The gradients of an outcome in the order of `wrt`, zeros where nothing depends on a leaf."""
        assert outcome.gradients is not None
        grads = outcome.gradients
        return [_filled(grads[key], self.problem.leaves[key]) for key in self.problem.wrt]

    def replay(self, problem: Problem, cotangents: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
        seed, *outputs = cotangents
        weights = self.weights(problem)
        weights = torch.zeros_like(weights) if seed is None else weights * seed
        outcome = self.backend(problem).meta_gradient(problem, weights, outputs or None, fold=False)
        assert outcome.gradients is not None
        return outcome.gradients

    def fake(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        like = leaves[0]
        results = [like.new_empty((self.problem.tasks,) if self.reduction == "none" else ())]
        results += [like.new_empty(t.shape, dtype=t.dtype) for t in self._outputs_like]
        return results + ([t.new_empty(t.shape) for t in self.wanted(leaves)] if self.ready else [])


class AdaptCall(Call):
    """The adapted parameters of all tasks, one result each, `(T, *shape)`, in the order of `problem.adapted`."""

    def __init__(self, problem: Problem, backend: str, check: Check) -> None:
        super().__init__(problem, backend, check)
        self.differentiable = len(problem.adapted)

    def forward(self, problem: Problem) -> list[Tensor]:
        outcome = self.backend(problem).adapt(problem, fold=True)
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


class _Function(torch.autograd.Function):
    """An autograd function without a forward-mode rule that says so."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        place, got = "InnerLoop under forward-mode autograd (jvp, jacfwd, hessian)", "a tangent of its arguments"
        way_out = "use torch.func.grad, vjp or jacrev, or write the loop in PyTorch"
        raise TransformError(message(place, got, "reverse mode", way_out))


def _apply(function: type[torch.autograd.Function], *args: Any) -> tuple[Any, ...]:
    results: tuple[Any, ...] = function.apply(*args)  # type: ignore[no-untyped-call]
    return results


class _Watched(TorchFunctionMode):
    """Raises where a tensor of a torch.func transform is read other than through a leaf."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in (*args, *kwargs.values()):
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                    raise _unseen("one that a torch.func transform wraps")
        return func(*args, **kwargs)


def _unseen(kind: str) -> TransformError:
    way_out = "pass it as a parameter, as a hyper-parameter or in the batch"
    place = "InnerLoop under a torch.func transform: a tensor in a closure, an attribute or a buffer"
    return TransformError(message(place, kind, "a constant", way_out))


def launch(call: Call) -> list[Tensor]:
    """Run a call on the way that autograd needs here; returns its differentiable results."""
    problem = call.problem
    if transformed():
        number = _register(call)
        return list(_apply(_Transformed, number, *problem.leaves.values()))[: call.differentiable]
    if not (problem.wrt and torch.is_grad_enabled()) and not tracing():
        return call.forward(problem)
    if not call.ready:
        call.remember()
    return list(_apply(_Eager, call, *[problem.leaves[key] for key in problem.wrt]))


# Eager


class _Eager(_Function):
    """The quick way: no registered operation between autograd and the backend."""

    @staticmethod
    def forward(ctx: Any, call: Call, *wanted: Tensor) -> tuple[Tensor, ...]:
        results = call.first_pass(call.problem)
        n = call.differentiable
        ctx.call = call
        # All leaves are saved, also those that take no gradient: autograd notices if one is changed in place.
        ctx.save_for_backward(*call.problem.leaves.values(), *results[n:])
        ctx.set_materialize_grads(False)
        return tuple(results[:n])

    @staticmethod
    @outside_compile
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        count = len(call.problem.leaves)
        saved = _saved(ctx)
        with torch.no_grad():
            if call.ready:
                seed = cotangents[0]
                whole = seed is not None and seed.device.type == "cpu" and seed.item() == 1.0
                grads = list(saved[count:]) if whole else _scaled(saved[count:], seed)
            else:
                grads = call.backward(call.problem, cotangents)
        if torch.is_grad_enabled():  # create_graph: whoever differentiates these shall hear of it
            grads = _once(grads, call.wanted(saved[:count]))
        return (None, *grads)


class _Once(_Function):
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


def _once(grads: Sequence[Tensor | None], leaves: Sequence[Tensor]) -> list[Tensor | None]:
    given = [g for g in grads if g is not None]
    passed = iter(_apply(_Once, len(given), *given, *leaves) if given else ())
    return [None if g is None else next(passed) for g in grads]


def _scaled(grads: Sequence[Tensor], seed: Tensor | None) -> list[Tensor | None]:
    """The gradients of a ready call for the true cotangent of its loss."""
    if seed is None:
        return [None] * len(grads)
    return [g * seed for g in grads]


def _saved(ctx: Any) -> tuple[Tensor, ...]:
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
    number = next(_numbers)
    _calls[number] = call
    return number


def _call(number: int) -> Call:
    try:
        return _calls[number]
    except KeyError:
        raise BackendError(
            f"metafast::replay: got call {number}, which is gone, expected one whose graph is alive; a traced or "
            "exported graph cannot outlive the call it was made from"
        ) from None


@contextlib.contextmanager
def _autograd_inside() -> Iterator[None]:
    """Registered operations run below autograd; the reference needs it back."""
    key = torch._C.DispatchKey
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for name in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        exclude = exclude.remove(getattr(key, name))
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), exclude):
        yield


@contextlib.contextmanager
def _installed(problem: Problem) -> Iterator[None]:
    """Put the leaves themselves on the model, where functional_call may have left tensors of a transform."""
    slots = []
    for name, leaf in problem.group("param").items():
        for alias in problem.aliases.get(name, (name,)):
            path, _, key = alias.rpartition(".")
            slots.append((problem.model.get_submodule(path)._parameters, key, leaf))
    with swapping:
        before = [store[key] for store, key, _ in slots]
        for store, key, leaf in slots:
            store[key] = cast(nn.Parameter, leaf)
        try:
            yield
        finally:
            for (store, key, _), tensor in zip(slots, before, strict=True):
                store[key] = tensor


def _own(tensor: Tensor) -> Tensor:
    """A registered operation's results are contiguous and share no memory, not with each other either."""
    return tensor.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("metafast::replay", mutates_args=())
def _replay(leaves: list[Tensor], call: int) -> list[Tensor]:
    known = _call(call)
    known.remember()
    assert known.surroundings is not None
    known.surroundings.rewind()  # every slice of a vmap draws the same
    problem = known.problem.with_leaves(leaves)
    with _autograd_inside(), known.surroundings.precision(), torch.no_grad(), _installed(problem), _Watched():
        if not problem.group("extern") and find_externs(problem):
            raise _unseen("one that requires grad")
        return [_own(t) for t in known.first_pass(problem)]


@_replay.register_fake
def _(leaves: list[Tensor], call: int) -> list[Tensor]:
    return _call(call).fake(leaves)


@torch.library.custom_op("metafast::replay_vjp", mutates_args=())
def _replay_vjp(leaves: list[Tensor], cotangents: list[Tensor], call: int) -> list[Tensor]:
    known = _call(call)
    problem = known.problem.with_leaves(leaves)
    with _autograd_inside(), _installed(problem), _Watched():
        grads = known.backward(problem, cotangents)
    return [_own(_filled(g, leaf)) for g, leaf in zip(grads, known.wanted(leaves), strict=True)]


@_replay_vjp.register_fake
def _(leaves: list[Tensor], cotangents: list[Tensor], call: int) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in _call(call).wanted(leaves)]


def _filled(grad: Tensor | None, leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if grad is None else grad


def _spread(call: Call, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of the wanted leaves at their places among all leaves."""
    by_key = dict(zip(call.problem.wrt, grads, strict=True))
    return [by_key.get(key) for key in call.problem.leaves]


def _op_setup(ctx: Any, inputs: Any, output: list[Tensor]) -> None:
    leaves, number = inputs
    ctx.call, ctx.number = _call(number), number
    ctx.save_for_backward(*leaves, *output[ctx.call.differentiable :])


@outside_compile
def _op_backward(ctx: Any, cotangents: list[Tensor | None]) -> Any:
    call: Call = ctx.call
    count = len(call.problem.leaves)
    saved = _saved(ctx)
    leaves, given = list(saved[:count]), cotangents[: call.differentiable]
    if call.ready:
        grads = _scaled(saved[count:], given[0])
    else:
        shapes = call.fake(leaves) if any(c is None for c in given) else []
        if shapes:
            given = [torch.zeros_like(s) if c is None else c for c, s in zip(given, shapes, strict=False)]
        grads = list(torch.ops.metafast.replay_vjp(leaves, list(given), ctx.number))
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        grads = _once(grads, call.wanted(leaves))
    return _spread(call, grads), None


def _never(ctx: Any, *cotangents: Any) -> Any:
    return _Once.backward(ctx)


_replay.register_autograd(_op_backward, setup_context=_op_setup)
_replay_vjp.register_autograd(_never)


def _op_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    *lists, number = args
    flat = [t for tensors in lists for t in tensors]
    dims = [d for dims in in_dims[: len(lists)] for d in dims]
    op: type[torch.autograd.Function] = _Transformed if len(lists) == 1 else _TransformedVjp
    runs = [_apply(op, number, *one) for one in _slices(info, dims, flat)]
    return [torch.stack(column) for column in zip(*runs, strict=True)], [0] * len(runs[0])


if hasattr(_replay, "register_vmap"):  # from torch 2.5; before, vmap over the bare operation raises
    _replay.register_vmap(_op_vmap)
    _replay_vjp.register_vmap(_op_vmap)


def _slices(info: Any, in_dims: Sequence[Any], tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The arguments of each slice of a vmap."""
    for i in range(info.batch_size):
        yield [t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims, strict=True)]


class _Transformed(_Function):
    """`metafast::replay` under torch.func transforms."""

    @staticmethod
    def forward(number: int, *leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.ops.metafast.replay(list(leaves), number))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        number, *leaves = inputs
        ctx.call, ctx.number = _call(number), number
        rest = output[ctx.call.differentiable :]
        ctx.mark_non_differentiable(*rest)
        ctx.save_for_backward(*leaves, *rest)

    @staticmethod
    @outside_compile
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        call: Call = ctx.call
        count = len(call.problem.leaves)
        saved = _saved(ctx)
        leaves = saved[:count]
        if call.ready:
            grads = _once(_scaled(saved[count:], cotangents[0]), call.wanted(leaves))
        else:
            grads = list(_apply(_TransformedVjp, ctx.number, *leaves, *cotangents[: call.differentiable]))
        return (None, *_spread(call, grads))

    @staticmethod
    def vmap(info: Any, in_dims: Any, number: int, *leaves: Tensor) -> Any:
        runs = [_apply(_Transformed, number, *one) for one in _slices(info, in_dims[1:], leaves)]
        return tuple(torch.stack(column) for column in zip(*runs, strict=True)), (0,) * len(runs[0])


class _TransformedVjp(_Function):
    """`metafast::replay_vjp` under torch.func transforms; differentiating it raises."""

    @staticmethod
    def forward(number: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(_call(number).problem.leaves)
        return tuple(torch.ops.metafast.replay_vjp(list(tensors[:count]), list(tensors[count:]), number))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return _Once.backward(ctx)

    @staticmethod
    def vmap(info: Any, in_dims: Any, number: int, *tensors: Tensor) -> Any:
        runs = [_apply(_TransformedVjp, number, *one) for one in _slices(info, in_dims[1:], tensors)]
        return tuple(torch.stack(column) for column in zip(*runs, strict=True)), (0,) * len(runs[0])
