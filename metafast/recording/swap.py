"""A model with other tensors for the time of a run, and a look at what the run did to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.hooks import RemovableHandle

from metafast.attributes import Attributes
from metafast.recording.recorder import Recorder

_COUNTER = "num_batches_tracked"


def copy_of(tensor: Tensor, requires_grad: bool) -> Tensor:
    """A leaf with the same values."""
    copy = tensor.detach().clone()
    return copy.requires_grad_() if requires_grad and copy.is_floating_point() else copy


class Swapped:
    """The model with copies of `params` and `buffers`, by first name, for its own, from `enter` until `leave`.

    Only the modules' own dictionaries are touched; a tied tensor has one copy, under its first name.
    """

    def __init__(
        self, model: nn.Module, recorder: Recorder, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]
    ) -> None:
        self._model, self._recorder = model, recorder
        self._params, self._buffers = params, buffers
        self._copies: dict[int, Tensor] = {}
        self._stores: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = []
        self._counters: dict[int, Tensor] = {}  # by module
        self._hooks: list[RemovableHandle] = []
        self._attributes = Attributes(model)

    def enter(self) -> dict[str, Tensor]:
        """Swap in the copies; returns them by leaf key."""
        leaves: dict[str, Tensor] = {}
        for path, module in self._model.named_modules():
            before = dict(module._parameters), dict(module._buffers)
            self._swap(path, "param", module._parameters, self._params, leaves)
            self._swap(path, "buffer", module._buffers, self._buffers, leaves)
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

    def changed(self) -> str | None:
        """The path of an attribute that is not what it was, if one is not."""
        for path, store, _, swapped in self._stores:
            for name in {**store, **swapped}:
                if store.get(name) is not swapped.get(name):
                    return f"{path}.{name}" if path else name
        return self._attributes.changed()

    def leave(self) -> None:
        """Restore everything."""
        for hook in self._hooks:
            hook.remove()
        for _, store, before, _ in self._stores:
            store.clear()
            store.update(before)
        self._attributes.restore()


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
