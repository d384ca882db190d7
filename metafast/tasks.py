"""Batches of tasks: any nesting of tuples, lists and dicts of tensors, each with a leading task dimension T."""

from __future__ import annotations

from collections import namedtuple  # as pytree names the type of every one of them
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .errors import InputError, InputTypeError, message

__all__ = ["PAIR", "count_tasks", "describe", "flatten", "nesting"]
__all__ += ["require_outputs", "require_pair", "stack", "take", "unflatten"]

PAIR = pytree.tree_flatten((0, 0))[1]
_ONE_TENSOR = pytree.tree_flatten(0)[1]
_REFUSED = (torch.float16, torch.bfloat16)


def flatten(batch: Any, place: str) -> tuple[list[Tensor], pytree.TreeSpec]:
    """The tensors of a batch, in order, and the nesting they came from.

    **Raises** `InputTypeError` where a leaf is no tensor, `InputError` where there is none at all.
    """
    if type(batch) is tuple and len(batch) == 2 and isinstance(batch[0], Tensor) and isinstance(batch[1], Tensor):
        return [batch[0], batch[1]], PAIR  # the common case: no walk
    leaves, spec = pytree.tree_flatten(batch)
    if not leaves:
        raise InputError(message(place, "no tensor", "at least one", "pass e.g. (x, y), each (T, N, ...)"))
    for index, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            where = place + _path(batch, index)
            raise InputTypeError(
                message(where, type(leaf).__name__, "a tensor with a leading task dimension", "use torch.as_tensor")
            )
    return leaves, spec


def nesting(spec: pytree.TreeSpec | None) -> Any:
    """What stands for a nesting in keys: equal for equal ones, and quick to hash for the common pair."""
    return "pair" if spec is PAIR else spec


def unflatten(tensors: Sequence[Any], spec: pytree.TreeSpec) -> Any:
    """The nesting of `spec` around `tensors`."""
    if spec is PAIR:
        return tensors[0], tensors[1]
    return pytree.tree_unflatten(list(tensors), spec)


def take(tensors: Sequence[Tensor], task: int) -> list[Tensor]:
    """The part of every tensor that belongs to one task."""
    return [tensor[task] for tensor in tensors]


def require_outputs(outputs: Any) -> None:
    """What a query objective returned beside the loss, for `return_outputs=True`. **Raises** `InputTypeError`."""
    if outputs is None:
        place, expected = "query objective with return_outputs=True", "(loss, outputs)"
        way_out = "return the outputs beside the loss, or leave return_outputs=False"
        raise InputTypeError(message(place, "a loss alone", expected, way_out))
    _require_tensors(pytree.tree_leaves(outputs), "outputs of the query objective")


def _require_tensors(leaves: Sequence[Any], place: str) -> None:
    wrong = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor)]
    if wrong or not leaves:
        got = wrong[0] if wrong else "no tensor"
        raise InputTypeError(message(place, got, "tensors", "return tensors only, in any nesting"))


def stack(per_task: Sequence[Any], place: str) -> Any:
    """What a function returned for each task, stacked: tensors become `(T, ...)`, the nesting stays."""
    flat = [pytree.tree_flatten(value) for value in per_task]
    leaves, spec = flat[0]
    _require_tensors(leaves, place)
    columns = zip(*(values for values, _ in flat), strict=True)
    return pytree.tree_unflatten([torch.stack(column) for column in columns], spec)


def count_tasks(batches: Sequence[tuple[str, Any, Sequence[Tensor]]], device: torch.device) -> int:
    """The number of tasks T that all tensors of all batches share.

    **Arguments**: `batches` are (place, batch as given, its tensors); `device` is the model's.
    **Raises** `InputError` for a tensor without a task dimension, for no task, for differing T;
    `InputTypeError` for float16 or bfloat16, for another device, and for sparse or nested tensors.
    """
    tasks = -1
    for place, batch, tensors in batches:
        for index, tensor in enumerate(tensors):
            dense = tensor.layout is torch.strided and not tensor.is_nested
            if dense and tensor.dim() and tensor.dtype not in _REFUSED and tensor.device == device:
                size = tensor.shape[0]
                if size == tasks or (tasks < 0 and size):
                    tasks = size
                    continue
            raise _wrong(place + _path(batch, index), tensor, tasks, device)
    return tasks


def require_pair(place: str, spec: pytree.TreeSpec, tensors: Sequence[Tensor]) -> None:
    """A loss reads `(x, y)`: two entries, examples along the second dimension of each, at least one of them.

    **Raises** `InputError` otherwise.
    """
    pair = spec is PAIR or (spec.type in (tuple, list, namedtuple) and _children(spec) == 2)
    if not pair:
        way_out = "pass objective=fn(model, batch) for batches of another nesting"
        nest = pytree.tree_unflatten([_Star()] * len(tensors), spec)
        raise InputError(message(place, f"a batch of nesting {nest!r}", "a pair (x, y)", way_out))
    for tensor in tensors:
        if tensor.dim() < 2:
            got = f"a tensor of shape {tuple(tensor.shape)}"
            way_out = "unsqueeze(0) makes one task of a batch"
            raise InputError(message(place, got, "(T, N, ...): tasks first, then examples", way_out))
        if tensor.numel() == 0:
            got = f"an empty tensor of shape {tuple(tensor.shape)}"
            raise InputError(message(place, got, "at least one example a task", "leave such tasks out"))


class _Star:
    """A tensor in the picture of a nesting."""

    def __repr__(self) -> str:
        return "*"


def describe(tensors: Sequence[Tensor]) -> str:
    """Shapes and dtypes, for messages."""
    return ", ".join(f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors)


def _children(spec: pytree.TreeSpec) -> int:
    return int(getattr(spec, "num_children", 0)) or len(getattr(spec, "children_specs", ()))


def _wrong(place: str, tensor: Tensor, tasks: int, device: torch.device) -> Exception:
    """The error for a tensor that `count_tasks` does not take."""
    if tensor.is_nested or tensor.layout is not torch.strided:
        got = "a nested tensor" if tensor.is_nested else f"a tensor of layout {tensor.layout}"
        way_out = "pad the tasks to one length" if tensor.is_nested else "use .to_dense()"
        return InputTypeError(message(place, got, "a dense tensor", way_out))
    if tensor.dim() == 0:
        way_out = "stack the tasks, or unsqueeze(0) for a single one"
        return InputError(message(place, "a tensor without dimensions", "a leading task dimension", way_out))
    if tensor.dtype in _REFUSED:
        return InputTypeError(message(place, tensor.dtype, "float32, float64 or an integer type", "use .float()"))
    if tensor.device != device:
        got, expected = f"device {tensor.device}", f"the model's, {device}"
        return InputTypeError(message(place, got, expected, f'use .to("{device}")'))
    shape = tuple(tensor.shape)
    if tensor.shape[0] == 0:
        return InputError(message(place, f"shape {shape}: no task", "T >= 1 tasks", "skip the call for an empty batch"))
    way_out = "every tensor of support and query needs the same leading task dimension (is it missing here?)"
    return InputError(message(place, f"shape {shape}: {tensor.shape[0]} tasks", f"{tasks} tasks", way_out))


def _path(batch: Any, index: int) -> str:
    """Where leaf `index` stands in a batch: "[1]", "['input']", or "" for a bare tensor."""
    paths, _ = pytree.tree_flatten_with_path(batch)
    return str(pytree.keystr(paths[index][0]))
