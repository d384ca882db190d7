"""The two modes under which the user's code runs: one sees the dispatcher's calls, one what never reaches it."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from metafast.recording.recorder import Recorder, tensors_of


class Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands every call of the dispatcher to the recorder."""

    supports_higher_order_operators = True  # so that torch.cond and its like reach the recorder

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._recorder = recorder

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True, the default, wraps __torch_dispatch__ so that its first call imports torch._dynamo: half a second.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # what the recorder itself asks of tensors is not the user's doing
            return self._recorder.call(func, args, kwargs or {})


_READS_DATA = "its values leave for Python or NumPy"
_MADE_OF_VALUES = "makes a tensor of other tensors' values, which would be frozen (torch.stack keeps them)"
_TAKES_GRADIENT = "a gradient is taken inside the loss"
_WATCHED: dict[Any, str] = {
    torch.Tensor.register_hook: "a tensor hook changes the gradient out of sight",
    torch.Tensor.register_post_accumulate_grad_hook: "a tensor hook acts out of sight",
    torch.Tensor.backward: _TAKES_GRADIENT,
    torch.autograd.grad: _TAKES_GRADIENT,
    torch.autograd.backward: _TAKES_GRADIENT,
    torch.Tensor.tolist: _READS_DATA,
    torch.Tensor.numpy: _READS_DATA,
    torch.Tensor.__array__: _READS_DATA,
    torch.Tensor.__dlpack__: _READS_DATA,
    torch.Tensor.data_ptr: _READS_DATA,
    torch.Tensor.untyped_storage: _READS_DATA,
    torch.Tensor.apply_: _READS_DATA,
    torch.Tensor.map_: _READS_DATA,
    torch.Tensor.__repr__: _READS_DATA,
    # Most ways to a number reach the dispatcher; not where torch.DoubleTensor([t, ...]) asks for it
    torch.Tensor.__float__: _READS_DATA,
    torch.Tensor.__index__: _READS_DATA,
    torch.Tensor.set_: "replaces a tensor's memory",
}
# Their tensors in lists are read element by element in C++, past the dispatcher
_OF_LISTS = {torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor, torch.Tensor.new}
_INDEXES = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}


class Functions(TorchFunctionMode):
    """Watches functions that act out of the dispatcher's sight, and takes some functions as one call."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {**_forgotten(func, args, kwargs or {}), **(kwargs or {})}
        recorder = self._recorder
        constant = bool(args) and isinstance(args[0], Tensor) and recorder.is_static(args[0])
        if (reason := _WATCHED.get(func)) is not None and not constant:
            recorder.refuse(_name(func), reason)
        elif getattr(func, "__self__", None) is torch.Tensor.data and not constant:
            recorder.refuse("Tensor.data", "reads or writes a value past autograd")
        elif getattr(func, "__self__", None) is torch.Tensor.grad_fn:
            return self._graph(func(*args))
        elif func is torch.tensor and type(args[0] if args else kwargs["data"]).__module__ == "numpy":
            recorder.refuse("torch.tensor", "reads a NumPy array, whose values would be frozen")
        elif not all(map(recorder.is_static, _in_lists(func, args, kwargs))):
            recorder.refuse(_name(func), _MADE_OF_VALUES)
        elif (name := _macro(func, args, kwargs)) is not None:
            return recorder.macro(name, func, args, kwargs)
        return func(*args, **kwargs)

    def _graph(self, node: Any) -> Any:
        if node is not None:
            self._recorder.refuse("Tensor.grad_fn", "reads the autograd graph, where hooks may change the gradient")
        return node


def _in_lists(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors in lists of which PyTorch makes one tensor; those of a tuple are each an index of its own."""
    given: Sequence[Any] = ()
    if func in _OF_LISTS:
        given = [*args, *kwargs.values()]
    elif func in _INDEXES:
        given = args[1] if isinstance(args[1], tuple) else [args[1]]
    return tensors_of([each for each in given if isinstance(each, (list, tuple))])


def _forgotten(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that a Python function of torch's was given and did not hand on to the mode.

    `F.l1_loss` hands on all but `weight` (2.13): under any mode its weights are lost. Its own frame, which called
    `handle_torch_function`, still has them.
    """
    code = getattr(func, "__code__", None)
    frame = sys._getframe(3) if code is not None else None
    if frame is None or frame.f_code is not code:
        return {}
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    rest = [name for name in names[len(args) :] if name not in kwargs]
    return {name: frame.f_locals[name] for name in rest if name in frame.f_locals} if rest else {}


def _name(func: Any) -> str:
    name = str(getattr(func, "__qualname__", func))
    return name.replace("TensorBase", "Tensor").replace("_VariableFunctionsClass", "torch")


def _macro(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """The name of a function to take as one call: one whose decomposition computes with labels, or reads them."""
    if func is torch.nn.functional.cross_entropy:
        target = args[1] if len(args) > 1 else kwargs.get("target")
        labels = isinstance(target, Tensor) and not target.is_floating_point()
        return "cross_entropy" if labels and kwargs.get("label_smoothing") else None
    if func is torch.nn.functional.one_hot:
        classes = args[1] if len(args) > 1 else kwargs.get("num_classes", -1)
        return "one_hot" if classes > 0 else None
    return None
