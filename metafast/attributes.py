"""What a model holds besides parameters and buffers: plain attributes of its modules, to bring back after a run."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["Attributes"]

_SIMPLE = (bool, int, float, complex, str, bytes, type(None))
_STORES = ("_parameters", "_buffers")


class Attributes:
    """The attributes of all modules, and the entries of lists, dicts, sets and deques among them, as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._modules: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = []
        for path, module in model.named_modules():
            plain = {k: v for k, v in module.__dict__.items() if k not in _STORES}
            containers = {k: c for k, v in plain.items() if (c := _contents(v)) is not None}
            self._modules.append((path, module.__dict__, plain, containers))

    def changed(self) -> str | None:
        """The dotted name of one that is not what it was, if one is not."""
        for path, now, plain, containers in self._modules:
            for name in _changes(now, plain, containers):
                return f"{path}.{name}" if path else name
        return None

    def restore(self) -> None:
        """Bring them back."""
        for _, now, plain, containers in self._modules:
            for name in list(_changes(now, plain, containers)):
                if name not in plain:
                    del now[name]
                    continue
                now[name] = plain[name]
                if name in containers and not _same_all(_contents(plain[name]), containers[name]):
                    _refill(plain[name], containers[name])


def _changes(now: dict[str, Any], plain: dict[str, Any], containers: dict[str, Any]) -> Iterator[str]:
    """The names of one module's attributes that are not as they were."""
    for name in now:
        if name not in plain and name not in _STORES:
            yield name
    for name, value in plain.items():
        if name not in now or not _same(now[name], value):
            yield name
    for name, contents in containers.items():
        if len(plain[name]) != len(contents) or (contents and not _same_all(_contents(plain[name]), contents)):
            yield name


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
