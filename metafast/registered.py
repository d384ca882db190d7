"""The registered operations `metafast::replay` and `metafast::replay_vjp`: the call under torch.func transforms.

Imported with the first transform: making them takes torch.library several milliseconds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .autograd import Call, Function, Once, apply, find_call, once, saved_by, scaled
from .errors import TransformError, message
from .externs import find_externs
from .problem import Problem, filled
from .reference import swapping
from .transforms import outside_compile

__all__ = ["Transformed"]


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
        for place in problem.places.get(name, (name,)):
            path, _, key = place.rpartition(".")
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
    known = find_call(call)
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
    return find_call(call).fake(leaves)


@torch.library.custom_op("metafast::replay_vjp", mutates_args=())
def _replay_vjp(leaves: list[Tensor], cotangents: list[Tensor], call: int) -> list[Tensor]:
    known = find_call(call)
    problem = known.problem.with_leaves(leaves)
    with _autograd_inside(), _installed(problem), _Watched():
        grads = known.backward(problem, cotangents)
    return [_own(filled(g, leaf)) for g, leaf in zip(grads, known.wanted(leaves), strict=True)]


@_replay_vjp.register_fake
def _(leaves: list[Tensor], cotangents: list[Tensor], call: int) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in find_call(call).wanted(leaves)]


def _spread(call: Call, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients of the wanted leaves at their places among all leaves."""
    by_key = dict(zip(call.problem.wrt, grads, strict=True))
    return [by_key.get(key) for key in call.problem.leaves]


def _op_setup(ctx: Any, inputs: Any, output: list[Tensor]) -> None:
    leaves, number = inputs
    ctx.call, ctx.number = find_call(number), number
    ctx.save_for_backward(*leaves, *output[ctx.call.differentiable :])


@outside_compile
def _op_backward(ctx: Any, cotangents: list[Tensor | None]) -> Any:
    call: Call = ctx.call
    count = len(call.problem.leaves)
    saved = saved_by(ctx)
    leaves, given = list(saved[:count]), cotangents[: call.differentiable]
    if call.ready:
        grads = scaled(saved[count:], given[0])
    else:
        shapes = call.fake(leaves) if any(c is None for c in given) else []
        if shapes:
            given = [torch.zeros_like(s) if c is None else c for c, s in zip(given, shapes, strict=False)]
        grads = list(torch.ops.metafast.replay_vjp(leaves, list(given), ctx.number))
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        grads = once(grads, call.wanted(leaves))
    return _spread(call, grads), None


def _never(ctx: Any, *cotangents: Any) -> Any:
    return Once.backward(ctx)


_replay.register_autograd(_op_backward, setup_context=_op_setup)
_replay_vjp.register_autograd(_never)


def _op_vmap(info: Any, in_dims: Any, *args: Any) -> Any:
    *lists, number = args
    flat = [t for tensors in lists for t in tensors]
    dims = [d for dims in in_dims[: len(lists)] for d in dims]
    op: type[torch.autograd.Function] = Transformed if len(lists) == 1 else _TransformedVjp
    runs = [apply(op, number, *one) for one in _slices(info, dims, flat)]
    return [torch.stack(column) for column in zip(*runs, strict=True)], [0] * len(runs[0])


if hasattr(_replay, "register_vmap"):  # from torch 2.5; before, vmap over the bare operation raises
    _replay.register_vmap(_op_vmap)
    _replay_vjp.register_vmap(_op_vmap)


def _slices(info: Any, in_dims: Sequence[Any], tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The arguments of each slice of a vmap."""
    for i in range(info.batch_size):
        yield [t if d is None else t.select(d, i) for t, d in zip(tensors, in_dims, strict=True)]


class Transformed(Function):
    """`metafast::replay` under torch.func transforms."""

    @staticmethod
    def forward(number: int, *leaves: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.ops.metafast.replay(list(leaves), number))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        number, *leaves = inputs
        ctx.call, ctx.number = find_call(number), number
        rest = output[ctx.call.differentiable :]
        ctx.mark_non_differentiable(*rest)
        ctx.save_for_backward(*leaves, *rest)

    @staticmethod
    @outside_compile
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        call: Call = ctx.call
        count = len(call.problem.leaves)
        saved = saved_by(ctx)
        leaves = saved[:count]
        if call.ready:
            grads = once(scaled(saved[count:], cotangents[0]), call.wanted(leaves))
        else:
            grads = list(apply(_TransformedVjp, ctx.number, *leaves, *cotangents[: call.differentiable]))
        return (None, *_spread(call, grads))

    @staticmethod
    def vmap(info: Any, in_dims: Any, number: int, *leaves: Tensor) -> Any:
        runs = [apply(Transformed, number, *one) for one in _slices(info, in_dims[1:], leaves)]
        return tuple(torch.stack(column) for column in zip(*runs, strict=True)), (0,) * len(runs[0])


class _TransformedVjp(Function):
    """`metafast::replay_vjp` under torch.func transforms; differentiating it raises."""

    @staticmethod
    def forward(number: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(find_call(number).problem.leaves)
        return tuple(torch.ops.metafast.replay_vjp(list(tensors[:count]), list(tensors[count:]), number))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> Any:
        return Once.backward(ctx)

    @staticmethod
    def vmap(info: Any, in_dims: Any, number: int, *tensors: Tensor) -> Any:
        runs = [apply(_TransformedVjp, number, *one) for one in _slices(info, in_dims[1:], tensors)]
        return tuple(torch.stack(column) for column in zip(*runs, strict=True)), (0,) * len(runs[0])
