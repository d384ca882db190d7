"""The adapted parameters of all tasks."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import tasks
from .batchnorm import Buffers
from .checkpoints import no_checkpoints
from .errors import InputError, InputTypeError, message
from .reference import located, swapping
from .structure import Structure
from .transforms import outside_compile

__all__ = ["FastWeights"]


class FastWeights(Mapping[str, Tensor]):
    """What the inner loop adapted: a mapping from parameter name to `(T, *shape)`, differentiable.

    Made by `InnerLoop.adapt`: φ_K of every task, in the model's dtype and on its device. The tensors are
    ordinary ones: any outer loss written in PyTorch may read them, and its backward pass runs the inner loop again for
    the meta-gradient (once: the meta-gradient itself cannot be differentiated). A tied parameter is held once; each of
    its names finds it. `tasks` is T. It is copied, pickled and saved with the model, as its tensors can be: of one with
    a graph PyTorch makes no deep copy, and pickles the values alone.

    **Raises** `KeyError` for a name that did not adapt.

    **Cost**: T copies of the adapted parameters.

    >>> fast = inner.adapt(support)             # doctest: +SKIP
    >>> logits = fast(x_query)                  # (T, Q, ways)
    >>> fast["head.weight"].shape               # (T, ways, features)
    """

    def __init__(self, model: nn.Module, structure: Structure, tensors: Mapping[str, Tensor], count: int) -> None:
        self._model = model
        self._structure: Structure | None = structure
        self._places = structure.places
        self._tensors = dict(tensors)
        self._first = {alias: name for name in tensors for alias in structure.aliases.get(name, (name,))}
        self.tasks = count

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._first:
            raise KeyError(f"{name}: got no adapted parameter of that name, expected one of {list(self._tensors)}")
        return self._tensors[self._first[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name}: {tuple(tensor.shape)}" for name, tensor in self._tensors.items())
        return f"FastWeights({self.tasks} tasks; {shapes})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_structure": None}  # holds places in this model, a copy has one of its own

    def task(self, index: int) -> dict[str, Tensor]:
        """The adapted parameters of one task, by name, differentiable: what `torch.func.functional_call` takes.

        **Arguments**: `index`, a task's number; negative ones count from the end. **Returns** views, each of its
        parameter's shape. **Raises** `IndexError` for a task that there is not, `InputTypeError` for another type.
        """
        try:
            index = operator.index(index)
        except TypeError:
            got = repr(index)
            raise InputTypeError(message("FastWeights.task(index)", got, "an int", "pass a task's number")) from None
        if not -self.tasks <= index < self.tasks:
            raise IndexError(f"FastWeights.task: got {index}, expected 0 .. {self.tasks - 1}")
        return {name: tensor[index] for name, tensor in self._tensors.items()}

    @outside_compile
    def __call__(self, *inputs: Any, **named_inputs: Any) -> Any:
        """Run the model on every task's inputs with that task's weights.

        **Arguments**: what the model takes; tensors, in any nesting, each with a leading task dimension `(T, ...)`.
        **Returns** what the model returns, tensors stacked to `(T, ...)`, differentiable in the weights, in
        parameters that did not adapt, and in the inputs. Running statistics are folded as the tasks in order would
        leave them.
        **Raises** `InputError` where a tensor has another number of tasks, `InputTypeError` where an input is no tensor
        or lies on another device, `TaskError` for what the model raises.
        **Cost**: T forward passes of the model in eager PyTorch, one after the other, each with its own graph.
        """
        return self._run(inputs, named_inputs)

    def _run(self, inputs: tuple[Any, ...], named_inputs: dict[str, Any]) -> Any:
        place = "inputs of FastWeights"
        batch = (inputs, named_inputs)
        flat, spec = tasks.flatten(batch, place)
        count = tasks.count_tasks([(place, batch, flat)], next(iter(self._tensors.values())).device)
        if count != self.tasks:
            way_out = "pass inputs for the tasks that were adapted"
            raise InputError(message(place, f"{count} tasks", f"{self.tasks} tasks", way_out))
        structure = self._structure = self._structure or Structure(self._model)
        buffers = Buffers(dict(zip(structure.buffer_names, structure.buffers(), strict=True)), structure.places)
        results = []
        with swapping, no_checkpoints():
            for index in range(self.tasks):
                own = tasks.take(flat, index)
                args, kwargs = pytree.tree_unflatten(own, spec)
                with located(f"task {index}, FastWeights", own):
                    results.append(self._forward(index, args, kwargs, buffers))
            buffers.write_back()
        return tasks.stack(results, "output of the model")

    def _forward(self, index: int, args: Any, kwargs: Any, buffers: Buffers) -> Any:
        places = self._places
        named = {place: t[index] for name, t in self._tensors.items() for place in places.get(name, (name,))}
        named.update(buffers.named())
        result = torch.func.functional_call(self._model, named, args, kwargs, tie_weights=False)
        buffers.update(named)
        return result
