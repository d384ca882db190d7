"""A model with other tensors for the time of a run, and a look at what the run did to it."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from metafast.recording.recorder import Recorder

_SIMPLE = (bool, int, float, complex, str, bytes, type(None))
_STORES = ("_parameters", "_buffers")
_COUNTER = "num_batches_tracked"


def copy_of(tensor: Tensor, requires_grad: bool) -> Tensor:
    """A leaf with the same values."""
    copy = tensor.detach().clone()
    return copy.requires_grad_() if requires_grad and copy.is_floating_point() else copy


class Swapped:
    """The model with copies for its parameters and buffers, until `leave`.

    Only the modules' own dictionaries are touched; a tied tensor has one copy, under its first name.
    """

    def __init__(self, model: nn.Module, recorder: Recorder) -> None:
        self._model, self._recorder = model, recorder
        self._copies: dict[int, Tensor] = {}
        self._stores: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = []
        self._counters: dict[int, Tensor] = {}  # by module
        self._hooks: list[RemovableHandle] = []
        self._modules: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = []

    def enter(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Swap in copies of these; returns the copies by leaf key."""
        leaves: dict[str, Tensor] = {}
        for path, module in self._model.named_modules():
            self._save(path, module)
            before = dict(module._parameters), dict(module._buffers)
            self._swap(path, "param", module._parameters, params, leaves)
            self._swap(path, "buffer", module._buffers, buffers, leaves)
            self._find_counter(path, module)
            for store, old in zip((module._parameters, module._buffers), before, strict=True):
                self._stores.append((path, store, old, dict(store)))
        for key, copy in leaves.items():
            self._recorder.leaf(key, copy)
        if self._counters:
            show = register_module_forward_hook(self._show, always_call=True)
            self._hooks = [register_module_forward_pre_hook(self._hide), show]
        return leaves

    def _swap(
        self, path: str, kind: str, store: dict[str, Any], given: Mapping[str, Tensor], leaves: dict[str, Tensor]
    ) -> None:
        for name, own in list(store.items()):
            if own is None:
                continue
            if id(own) not in self._copies:
                full = _join(path, name)
                value = given.get(full, own)
                copy = copy_of(value, kind == "param" or value.requires_grad)
                leaves[f"{kind}/{full}"] = self._copies[id(own)] = copy
                if own.layout is torch.strided:
                    self._recorder.originals[own.untyped_storage()._cdata] = full
            store[name] = self._copies[id(own)]

    def _hide(self, module: nn.Module, args: Any) -> None:
        """While a layer runs: one that sees no counter of its batches neither writes nor reads it, and its passes are
        folded elsewhere. Whoever else reads the counter is seen to read what moves."""
        if id(module) in self._counters:
            module._buffers[_COUNTER] = None

    def _show(self, module: nn.Module, args: Any, result: Any) -> None:
        if id(module) in self._counters:
            module._buffers[_COUNTER] = self._counters[id(module)]

    def _find_counter(self, path: str, module: nn.Module) -> None:
        """Note a layer whose counter is to be hidden."""
        if not (isinstance(module, _NormBase) and module.training and module.running_mean is not None):
            return
        forward = getattr(module.forward, "__func__", module.forward)
        code = getattr(forward, "__code__", None)
        if forward is not _BatchNorm.forward and (code is None or _COUNTER in code.co_names):
            return  # it may insist on its counter (SyncBatchNorm does), and writing to that is refused
        counter = module._buffers.get(_COUNTER)
        momentum = module.momentum if counter is not None else module.momentum or 0.0
        self._recorder.momenta.setdefault(path, momentum)
        if counter is not None:
            self._counters[id(module)] = counter

    def _save(self, path: str, module: nn.Module) -> None:
        plain = {k: v for k, v in module.__dict__.items() if k not in _STORES}
        containers = {k: c for k, v in plain.items() if (c := _contents(v)) is not None}
        self._modules.append((path, module.__dict__, plain, containers))

    def changed(self) -> str | None:
        """The path of an attribute that is not what it was, if one is not."""
        for path, store, _, swapped in self._stores:
            for name in {**store, **swapped}:
                if store.get(name) is not swapped.get(name):
                    return _join(path, name)
        for path, now, plain, containers in self._modules:
            for name in _changes(now, plain, containers):
                return _join(path, name)
        return None

    def leave(self) -> None:
        """Restore everything."""
        for hook in self._hooks:
            hook.remove()
        for _, store, before, _ in self._stores:
            store.clear()
            store.update(before)
        for _, now, plain, containers in self._modules:
            _restore(now, plain, containers)


def _changes(now: dict[str, Any], plain: dict[str, Any], containers: dict[str, Any]) -> Iterator[str]:
    """The names of a module's attributes that are not as they were."""
    for name in now:
        if name not in plain and name not in _STORES:
            yield name
    for name, value in plain.items():
        if name not in now or not _same(now[name], value):
            yield name
    for name, contents in containers.items():
        if not _same_all(_contents(plain[name]), contents):
            yield name


def _restore(now: dict[str, Any], plain: dict[str, Any], containers: dict[str, Any]) -> None:
    for name in list(_changes(now, plain, containers)):
        if name not in plain:
            del now[name]
            continue
        now[name] = plain[name]
        if name in containers and not _same_all(_contents(plain[name]), containers[name]):
            _refill(plain[name], containers[name])


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _contents(value: Any) -> Any:
    """A container's elements, to compare and restore; None for anything else."""
    if isinstance(value, dict):
        return list(value.items())
    return list(value) if isinstance(value, (list, set, collections.deque, bytearray)) else None


def _refill(value: Any, contents: list[Any]) -> None:
    value.clear()
    if isinstance(value, (dict, set)):
        value.update(contents)
    else:
        value.extend(contents)


def _same(a: Any, b: Any) -> bool:
    """The same object, an equal number or string, or tuples of such."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    return _same_all(a, b) if isinstance(a, tuple) else isinstance(a, _SIMPLE) and bool(a == b)


def _same_all(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
