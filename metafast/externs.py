"""Tensors that the losses read from outside: closures, attributes, globals.

Those that require grad receive a meta-gradient. They are found by running one task under a dispatch mode that looks at
the arguments of every operation; the result is kept while the places where such tensors can lie hold the same objects.
"""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .problem import Problem
from .reference import Reference

__all__ = ["Places", "find_externs"]

_DEPTH = 4  # how deep containers and plain objects are looked through
_WIDTH = 256  # longer containers are taken for data
_PLAIN = frozenset({int, float, bool, str, bytes, type(None), torch.dtype, torch.device})


def find_externs(problem: Problem) -> list[Tensor]:
    """The tensors that require grad and are read, but are not leaves of `problem`: in the order of first use.

    Runs the first task through one inner step and the query loss; buffers and random state are as before afterwards.
    A parameter that a closure reads directly, past the model, counts too: there it stands for its initial value.
    """
    seen = _Seen()
    one = replace(
        problem,
        leaves={key: _first_task(key, leaf) for key, leaf in problem.leaves.items()},
        tasks=1,
        steps=min(problem.steps, 1),
        wrt=(),
    )
    device = problem.parameter.device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad(), seen:
        if problem.query_spec is None:
            Reference().adapt(one, fold=False)
        else:
            Reference().losses(one, fold=False)
    return seen.alive()


def _first_task(key: str, leaf: Tensor) -> Tensor:
    return leaf.detach()[:1] if key.startswith(("support/", "query/")) else leaf.detach()


class _Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every argument that requires grad and was there before: a leaf, or made by an older autograd node."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        probe = torch.zeros((), requires_grad=True)
        self._start = _age(probe + 0)
        self._found: dict[int, weakref.ref[Tensor]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No wrapper around `__torch_dispatch__`: it would import all of dynamo at the first operation."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in (*args, *kwargs.values()):
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, Tensor) and tensor.requires_grad and _age(tensor) < self._start:
                    self._found.setdefault(id(tensor), weakref.ref(tensor))
        return func(*args, **kwargs)

    def alive(self) -> list[Tensor]:
        """What outlived the run: leaves that the run itself made are gone by now."""
        return [tensor for tensor in (ref() for ref in self._found.values()) if tensor is not None]


def _age(tensor: Tensor) -> int:
    """The number of the autograd node that made a tensor; leaves count as oldest."""
    return -1 if tensor.grad_fn is None else int(tensor.grad_fn._sequence_nr())


class Places:
    """Where a tensor can lie that no argument names: closure cells, attributes of user modules, containers in them.

    `same()` is cheap, and false as soon as one of them holds another object, or a tensor in one of them began or ceased
    to require grad.
    """

    def __init__(self, model: nn.Module, *roots: Any) -> None:
        self._readers: list[Any] = []
        self._keep: list[Any] = []
        self._tensors: list[weakref.ref[Tensor]] = []
        self._visited: set[int] = set()
        self._inside = {id(m) for m in model.modules()}
        for module in model.modules():
            self._hooks(module)
            if not _known(type(module)):  # torch's own read what they were built with
                self._read(module.__dict__, 1)
                self._look(type(module).forward, 1)
        for root in roots:
            self._look(root, 0)
        self._ids = self._now()
        self._grad = self._flags()

    def same(self) -> bool:
        """Whether all places hold what they held."""
        return self._now() == self._ids and self._flags() == self._grad

    def _now(self) -> list[int]:
        ids: list[int] = []
        for reader in self._readers:
            ids.extend([0 if type(value) in _PLAIN else id(value) for value in reader()])
        return ids

    def _flags(self) -> list[bool | None]:
        flags: list[bool | None] = []
        for ref in self._tensors:
            tensor = ref()
            flags.append(None if tensor is None else tensor.requires_grad)
        return flags

    def _hooks(self, module: nn.Module) -> None:
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            if hooks:
                self._read(hooks, 1)

    def _read(self, store: Any, depth: int) -> None:
        """Watch a dict or list, and what lies in it."""
        if len(store) > _WIDTH:
            return
        self._readers.append(store.values if isinstance(store, dict) else functools.partial(tuple, store))
        for value in list(store.values()) if isinstance(store, dict) else store:
            self._look(value, depth + 1)

    def _look(self, value: Any, depth: int) -> None:
        if isinstance(value, Tensor):
            self._tensors.append(weakref.ref(value))
            return
        if id(value) in self._visited or depth > _DEPTH or id(value) in self._inside:
            return
        if type(value) in _PLAIN or isinstance(value, types.ModuleType):
            return
        self._visited.add(id(value))
        self._keep.append(value)
        if isinstance(value, nn.Module) and _known(type(value)):
            for store in (value._parameters, value._buffers, value._modules):
                if store:
                    self._read(store, depth)
            return
        if isinstance(value, types.FunctionType) and _known(value):
            return
        if isinstance(value, (dict, list, tuple, set)):
            if isinstance(value, dict) and any(not isinstance(k, (str, int)) for k in value):
                return
            self._read(value, depth)
            return
        for part in _parts(value):
            if isinstance(part, dict):
                self._read(part, depth)
            else:
                self._look(part, depth)
        self._cells(value, depth)

    def _cells(self, value: Any, depth: int) -> None:
        """Closure cells and the globals that a function names."""
        if not isinstance(value, types.FunctionType):
            return
        for cell in value.__closure__ or ():
            self._readers.append(functools.partial(_content, cell))
            for content in _content(cell):
                self._look(content, depth + 1)
        scope = value.__globals__
        names = [n for n in value.__code__.co_names if isinstance(scope.get(n), (Tensor, dict, list, tuple))]
        if names:
            self._readers.append(functools.partial(_named, scope, names))
            for content in _named(scope, names):
                self._look(content, depth + 1)


def _known(value: Any) -> bool:
    """Whether a class or function is torch's or our own, which read nothing but their arguments and tensors."""
    return str(value.__module__).startswith(("torch.nn.", "metafast."))


def _parts(value: Any) -> Iterator[Any]:
    """What a callable or plain object carries along."""
    if isinstance(value, functools.partial):
        yield value.func
        yield value.args
        yield value.keywords
    elif isinstance(value, types.MethodType):
        yield value.__self__
        yield value.__func__
    elif isinstance(value, types.FunctionType):
        if value.__defaults__:
            yield value.__defaults__
        if value.__kwdefaults__:
            yield value.__kwdefaults__
    elif isinstance(getattr(value, "__dict__", None), dict) and not isinstance(value, type):
        yield value.__dict__
        called = type(value).__dict__.get("__call__")
        if isinstance(called, types.FunctionType):
            yield called


def _content(cell: Any) -> tuple[Any, ...]:
    try:
        return (cell.cell_contents,)
    except ValueError:  # not yet filled
        return ()


def _named(store: dict[str, Any], names: list[str]) -> list[Any]:
    return [store.get(name) for name in names]
