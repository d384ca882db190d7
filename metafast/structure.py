"""What a module holds, traversed once and read again cheaply at every call.

A traversal of a four-layer conv net costs some 90 µs, `Structure.current` and the two readers together about 5.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["Structure"]

_Slot = tuple[dict[str, Any], str]


class Structure:
    """The parameters and buffers of a module by their first names, and where each lies.

    `parameter_names` and `buffer_names` hold first names; `aliases` maps each first name to all names of that tensor,
    itself first; `places` to one name for each dictionary entry that holds it. A module registered twice gives an entry
    two names, and who swaps an entry twice restores what he swapped in. Values are read from the modules at each call,
    so a swapped tensor (`functional_call`, `.to()`) is seen; `current` tells whether modules, parameters or buffers
    were added, removed, replaced or tied since.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        modules = list(module.modules())
        self._children = [(m._modules, list(m._modules.values())) for m in modules if m._modules]
        self._stores: list[dict[str, Any]] = [d for m in modules for d in (m._parameters, m._buffers, m._modules)]
        self._sizes = list(map(len, self._stores))
        self._empty: list[_Slot] = [
            (d, key) for m in modules for d in (m._parameters, m._buffers) for key in d if d[key] is None
        ]
        self._dicts = [m.__dict__ for m in modules if "training" in m.__dict__]
        self.aliases: dict[str, tuple[str, ...]] = {}
        self.places: dict[str, tuple[str, ...]] = {}
        self._same: list[tuple[_Slot, _Slot]] = []
        self.parameter_names, self._parameters = self._find(module, "_parameters")
        self.buffer_names, self._buffers = self._find(module, "_buffers")

    def _find(self, module: nn.Module, kind: str) -> tuple[tuple[str, ...], list[_Slot]]:
        """First names and slots of the tensors of one kind; notes aliases on the way."""
        first: dict[int, tuple[str, _Slot]] = {}
        met: set[tuple[int, str]] = set()
        for prefix, owner in module.named_modules(remove_duplicate=False):
            store: dict[str, Any] = getattr(owner, kind)
            for key, tensor in store.items():
                if tensor is None:
                    continue
                name, slot = (f"{prefix}.{key}" if prefix else key), (store, key)
                known = first.setdefault(id(tensor), (name, slot))
                self.aliases[known[0]] = (*self.aliases.get(known[0], ()), name)
                if (id(store), key) not in met:
                    met.add((id(store), key))
                    self.places[known[0]] = (*self.places.get(known[0], ()), name)
                if known[1][0] is not store or known[1][1] != key:
                    self._same.append((known[1], slot))
        return tuple(name for name, _ in first.values()), [slot for _, slot in first.values()]

    def current(self) -> bool:
        """Whether the names and ties found at construction still hold."""
        for store, children in self._children:
            if list(store.values()) != children:
                return False
        if list(map(len, self._stores)) != self._sizes:
            return False
        try:
            for store, key in self._empty:
                if store[key] is not None:
                    return False
            for (store, key), (other, name) in self._same:
                if store[key] is not other[name]:
                    return False
            for slots in (self._parameters, self._buffers):
                tensors = {id(store[key]) for store, key in slots}
                if len(tensors) != len(slots) or id(None) in tensors:
                    return False
        except KeyError:
            return False
        return True

    def parameters(self) -> list[Tensor]:
        """The parameters as they are now, parallel to `parameter_names`."""
        return [store[key] for store, key in self._parameters]

    def buffers(self) -> list[Tensor]:
        """The buffers as they are now, parallel to `buffer_names`."""
        return [store[key] for store, key in self._buffers]

    def training(self) -> tuple[bool, ...]:
        """The training flag of every module that has one of its own, in the order of `modules()`."""
        return tuple([d["training"] for d in self._dicts])


