"""Capture: one eager run of a loss, or of an update rule, on one task's real tensors, written down as a Trace.

The run is the user's own code under two modes. A dispatch mode records every aten call with the tensors it read and made
(tensors keep their identity, so this is a graph); a function mode sees what never reaches the dispatcher (hooks, `.data`,
`tolist`). Whatever would make a replay of the trace differ from the run, now or with other values, raises `Unsupported`:

    values that steer Python          item, bool(tensor), nonzero, boolean masks as indices
    gradients that are not the ops'   autograd.Function, hooks, autograd.grad or backward inside the loss
    state                             in-place writes to parameters, buffers, batches or outer tensors; changed attributes
    randomness                        dropout in training, rand, Python's or NumPy's generators

Parameters and buffers are swapped for copies on the modules themselves for the time of the run; random state, modules and
their attributes are as before afterwards, whatever happens. No part of torch that pulls in its compiler is touched: the
first capture in a process costs what the eager run costs.
"""

from __future__ import annotations

import collections
import contextlib
import linecache
import os
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from metafast.errors import InputError, InputTypeError, MetafastError, message

__all__ = ["Call", "Origin", "Ref", "Stat", "TensorInfo", "Trace", "Unsupported", "capture", "capture_function"]
__all__ += ["OpInfo", "find_externs", "op_info"]


class Unsupported(MetafastError):
    """Something that cannot go native: which op, where (module path and the user's line), and why."""

    def __init__(self, op: str, origin: object, reason: str) -> None:
        self.op, self.origin, self.reason = op, str(origin), reason
        where = f" in {self.origin}" if self.origin else ""
        super().__init__(f"{op}{where}: {reason}")


# ---- what a trace is made of ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ref:
    """A tensor of the run: a position in `Trace.tensors`."""

    id: int


@dataclass
class TensorInfo:
    """What is known of a tensor: `key` for a leaf ("param/w"), `literal` its values where the code spelled them out."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    key: str | None = None
    literal: Tensor | None = None
    requires_grad: bool = False


@dataclass(frozen=True)
class Origin:
    """The innermost module of the model that was running, and the user's line."""

    module: str = ""
    code: CodeType | None = None
    line: int = 0

    def __str__(self) -> str:
        if self.code is None:
            return self.module
        name = self.code.co_filename
        text = linecache.getline(name, self.line).strip()
        place = f"{os.path.basename(name)}:{self.line}" + (f" `{text}`" if text else "")
        return f"{self.module}: {place}" if self.module else place


@dataclass
class Call:
    """`outputs = op(*args, **kwargs)`, tensors replaced by Refs; `func` is None for a macro, which only has a name."""

    op: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any
    grad: bool
    origin: Origin


@dataclass(frozen=True)
class Stat:
    """A BatchNorm pass in training mode: the Graph's outputs `<output>/mean` and `<output>/var` (biased) are its
    statistics, each over `count` elements a channel. `momentum` None is a cumulative average."""

    path: str
    output: str
    momentum: float | None
    count: int
    position: int  # in Trace.calls


@dataclass
class Trace:
    """What one run did. `loss` is the eager loss; `gradients` the eager gradient of it, computed when first read."""

    calls: list[Call]
    tensors: list[TensorInfo]
    dtype: torch.dtype
    loss_ref: Ref | None
    outputs: dict[str, Ref]
    output_spec: Any
    externs: list[tuple[str, Tensor]]
    stats: list[Stat]
    loss: Tensor | None = None
    _leaves: dict[str, Tensor] = field(default_factory=dict)
    _root: Tensor | None = None
    _gradients: dict[str, Tensor | None] = field(default_factory=dict)

    @property
    def gradients(self) -> dict[str, Tensor | None]:
        """The gradient of the eager loss by leaf key, None where nothing depends on the leaf. Frees the run's tensors."""
        if self._root is not None:
            keys = [k for k, t in self._leaves.items() if t.requires_grad]
            grads: Sequence[Tensor | None] = [None] * len(keys)
            if self._root.requires_grad and keys:
                grads = torch.autograd.grad(self._root, [self._leaves[k] for k in keys], allow_unused=True)
            self._gradients = dict(zip(keys, grads, strict=True))
            self._root, self._leaves = None, {}
        return self._gradients


# ---- what is known of an op -----------------------------------------------------------------------------------

_LIFT = {"lift", "lift_fresh"}
_SHAPE_ONLY = {"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"}
_SHAPE_ONLY |= {"new_empty_strided"}
_BATCH_NORM = {"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_native_batch_norm_legit"}
_BATCH_NORM_UPDATE = {"_batch_norm_with_update"}


@dataclass(frozen=True)
class OpInfo:
    """An overload, read from its schema: `base` is the name without overload, `writes` the positions and names of the
    arguments that change in place, `view` whether results share memory with an argument."""

    name: str
    base: str
    writes: tuple[tuple[int, str], ...]
    view: bool
    random: bool
    steers: bool
    reshapes: bool  # changes an argument's own shape in place (unsqueeze_)


_INFO: dict[Any, OpInfo] = {}


def op_info(func: Any) -> OpInfo:
    """What the schema says of an overload; cached."""
    found = _INFO.get(func)
    if found is None:
        schema, tags = func._schema, func.tags
        writes = tuple(
            (i, a.name) for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write
        )
        shares = any(r.alias_info is not None for r in schema.returns)
        found = _INFO[func] = OpInfo(
            name=str(func),
            base=schema.name.split("::")[1] if schema.name.startswith("aten::") else schema.name,
            writes=writes,
            view=shares and not writes,
            random=torch.Tag.nondeterministic_seeded in tags,
            steers=torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags,
            reshapes=torch.Tag.inplace_view in tags,
        )
    return found


# ---- the recorder ---------------------------------------------------------------------------------------------

_STATIC, _VALUE = "static", "value"  # what a storage holds, unless it holds a leaf: then its key
_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_FOREIGN: dict[CodeType, bool] = {}  # code → whether it is the user's


def _is_user_code(code: CodeType) -> bool:
    found = _FOREIGN.get(code)
    if found is None:
        name = code.co_filename
        outside = not name.startswith((_HERE, _TORCH)) and os.path.basename(name) not in ("contextlib.py", "functools.py")
        found = _FOREIGN[code] = outside
    return found


class _Recorder:
    """Writes down one run. `strict` raises at the first hazard; else hazards are passed over (to find externs)."""

    def __init__(self, model: nn.Module | None, *, strict: bool = True, known: Mapping[str, Tensor] | None = None) -> None:
        self.strict = strict
        self.calls: list[Call] = []
        self.tensors: list[TensorInfo] = []
        self.stats: list[Stat] = []
        self.externs: list[tuple[str, Tensor]] = []
        self.hazard: Unsupported | None = None
        self.paused = False
        self.dtype = torch.float32
        self.modules = {id(m): (n or type(m).__name__, m) for n, m in model.named_modules()} if model is not None else {}
        self.functions: dict[str, Origin] = {}  # autograd.Function by name → where it was applied
        self.momenta: dict[str, float | None] = {}
        self.originals: dict[int, str] = {}  # storages of the model's own parameters and buffers
        self._known = {id(t): key for key, t in (known or {}).items()}
        self._refs: dict[int, Ref] = {}
        self._keep: list[Tensor] = []
        self._storages: dict[int, str] = {}
        self._dirty: set[str] = set()  # buffers that BatchNorm has updated
        self._undo: list[tuple[Tensor, Tensor]] = []

    # -- tensors

    def leaf(self, key: str, tensor: Tensor) -> Ref:
        """Declare a tensor that comes from outside."""
        return self._add(tensor, TensorInfo(tuple(tensor.shape), tensor.dtype, key), key)

    def _add(self, tensor: Tensor, info: TensorInfo, kind: str) -> Ref:
        ref = self._refs[id(tensor)] = Ref(len(self.tensors))
        self.tensors.append(info)
        self._keep.append(tensor)
        if tensor.layout is torch.strided:
            self._storages.setdefault(tensor.untyped_storage()._cdata, kind)
        return ref

    def kind(self, tensor: Tensor) -> str:
        """What a known tensor's memory holds: a leaf's key, "static" or "value"."""
        return self._storages.get(tensor.untyped_storage()._cdata, _VALUE) if tensor.layout is torch.strided else _VALUE

    def ref(self, tensor: Tensor, op: str) -> Ref:
        """The Ref of a tensor that an op reads; an unknown one is a tensor found outside."""
        found = self._refs.get(id(tensor))
        if found is not None:
            if self._dirty and self.kind(tensor) in self._dirty:
                self.refuse(op, f"reads {self.kind(tensor)} after BatchNorm has updated it")
            return found
        if type(tensor) not in (Tensor, nn.Parameter):
            self.refuse(op, f"reads a {type(tensor).__name__}, a subclass of Tensor")
        elif tensor.layout is not torch.strided:
            self.refuse(op, f"reads a tensor of layout {tensor.layout}")
        else:
            shared = self._storages.get(tensor.untyped_storage()._cdata)
            if shared is not None and not shared.startswith("extern/"):
                what = shared if "/" in shared else "a value of the loss"
                self.refuse(op, f"reads memory of {what} past autograd (`.data`, nn.Parameter(value), set_)")
            elif self.strict and (name := self.originals.get(tensor.untyped_storage()._cdata)) is not None:
                self.refuse(op, f"reads {name} past its module's attribute, where the adapted value does not reach")
        key = self._known.get(id(tensor)) or f"extern/{id(tensor):x}"
        self.externs.append((key, tensor))
        return self.leaf(key, tensor)

    def _map(self, x: Any, f: Callable[[Tensor], Any]) -> Any:
        if isinstance(x, Tensor):
            return f(x)
        if isinstance(x, (list, tuple)):
            return [self._map(e, f) for e in x]
        return x

    def _result(self, tensor: Tensor, kind: str) -> Ref:
        """The Ref of what an op returned: its argument, for one in place."""
        found = self._refs.get(id(tensor))
        if found is not None:
            return found
        return self._add(tensor, TensorInfo(tuple(tensor.shape), tensor.dtype), kind)

    # -- calls

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record one call of the dispatcher and make it."""
        if self.paused:
            return func(*args, **kwargs)
        info = op_info(func)
        if torch._C._current_graph_task_id() != -1:
            self.refuse(info.name, "a gradient is taken inside the loss (autograd.grad or backward)")
        if info.base in _LIFT and id(args[0]) not in self._refs:
            return self._lift(info, func, args)
        tensors = list(_tensors(args)) + list(_tensors(kwargs.values()))
        refs = (tuple(self._map(a, lambda t: self.ref(t, info.name)) for a in args)), {
            k: self._map(v, lambda t: self.ref(t, info.name)) for k, v in kwargs.items()
        }
        static = all(self.kind(t) == _STATIC for t in tensors)
        self._refuse_hazards(info, args, kwargs, static)
        if info.base in _BATCH_NORM or info.base in _BATCH_NORM_UPDATE:
            self._batch_norm(info, args)
        out = func(*args, **kwargs)
        self._note_writes(info, args, kwargs, static)
        if not isinstance(out, (Tensor, list, tuple)):
            if not static and out is not None:
                self.refuse(info.name, "its result is a Python value that depends on the data")
            return out
        kind = _STATIC if static or info.base in _SHAPE_ONLY else _VALUE
        outputs = self._map(out, lambda t: self._result(t, kind))
        self._append(info.name, func, *refs, outputs)
        return out

    def macro(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a function above the dispatcher as one call."""
        refs = self._map(args, lambda t: self.ref(t, name)), {
            k: self._map(v, lambda t: self.ref(t, name)) for k, v in kwargs.items()
        }
        self.paused = True
        try:
            out = func(*args, **kwargs)
        finally:
            self.paused = False
        outputs = self._map(out, lambda t: self._result(t, _VALUE))
        self._append(name, None, tuple(refs[0]), refs[1], outputs)
        return out

    def _append(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> None:
        grad = torch.is_grad_enabled()
        self.calls.append(Call(name, func, args, kwargs, outputs, grad, self.origin(custom=not grad)))

    def _lift(self, info: OpInfo, func: Any, args: tuple[Any, ...]) -> Any:
        """`torch.tensor(...)`: values that the code spelled out."""
        (tensor,) = args
        if not tensor.untyped_storage().resizable():
            self.refuse(info.name, "reads a NumPy array or a buffer, whose values would be frozen")
        out = func(*args)
        self._add(out, TensorInfo(tuple(out.shape), out.dtype, literal=out.detach().clone()), _STATIC)
        if tensor is not out:
            self._keep.append(tensor)
        return out

    # -- hazards

    def refuse(self, op: str, reason: str, origin: Origin | None = None) -> None:
        """Note a hazard, and raise it unless hazards are passed over."""
        error = Unsupported(op, origin if origin is not None else self.origin(), reason)
        if self.hazard is None:
            self.hazard = error
        if self.strict:
            raise error

    def _refuse_hazards(self, info: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any], static: bool) -> None:
        if info.random:
            self.refuse(info.name, "draws random numbers")
        if info.steers and not static:
            self.refuse(info.name, "its result steers Python, or has a shape that depends on the data")
        if info.base in ("index", "index_put", "index_put_") and any(
            t.dtype in (torch.bool, torch.uint8) and self.kind(t) != _STATIC for t in _tensors(args[1])
        ):
            self.refuse(info.name, "a boolean mask as index makes a shape that depends on the data")
        for tensor in _written(info, args, kwargs):
            kind = self.kind(tensor)
            if "/" in kind:
                what = "a tensor found outside" if kind.startswith("extern/") else kind
                self.refuse(info.name, f"changes {what} in place")
                self._undo.append((tensor, tensor.detach().clone()))

    def _note_writes(self, info: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any], static: bool) -> None:
        if static:
            return
        for tensor in _written(info, args, kwargs):
            storage = tensor.untyped_storage()._cdata
            if self._storages.get(storage) == _STATIC:
                self._storages[storage] = _VALUE

    def undo(self) -> None:
        """Give tensors found outside their values back."""
        with torch.no_grad():
            for tensor, before in reversed(self._undo):
                tensor.copy_(before)

    def _batch_norm(self, info: OpInfo, args: tuple[Any, ...]) -> None:
        """Note the running statistics that a pass in training mode updates (the schema does not say that it does)."""
        if len(args) < 8 and info.base not in _BATCH_NORM_UPDATE:
            return  # without running statistics
        mean = args[3]
        training = info.base in _BATCH_NORM_UPDATE or args[5]
        if mean is None or not training:
            return
        key = self.kind(mean)
        path = key.removeprefix("buffer/").rpartition(".")[0]
        owner = key.startswith("buffer/") and path in self.momenta
        if not owner or self.tensors[self._refs[id(mean)].id].key != key:
            self.refuse(info.name, "updates running statistics that are not the buffers of a BatchNorm module")
            return
        self._dirty.update((key, self.kind(args[4])))
        count = args[0].numel() // max(args[0].shape[1], 1)
        calls = sum(s.path == path for s in self.stats)
        self.stats.append(Stat(path, f"stat/{path}/{calls}", self.momenta[path], count, len(self.calls)))

    # -- origins

    def origin(self, *, custom: bool = False) -> Origin:
        """Where the run is: the innermost module of the model on the stack, and the innermost line of user code."""
        module, code, line = "", None, 0
        frame = sys._getframe(1)
        while frame is not None and frame.f_code is not _RUN:
            here = frame.f_code
            if code is None and _is_user_code(here):
                code, line = here, frame.f_lineno
            if here is _MODULE_CALL and not module:
                known = self.modules.get(id(frame.f_locals.get("self")))
                module = known[0] if known is not None else ""
            if custom and here is _FUNCTION_APPLY and (cls := frame.f_locals.get("cls")) is not None:
                self.functions.setdefault(cls.__name__, self._outside(frame))
            frame = frame.f_back  # type: ignore[assignment]
        return Origin(module, code, line)

    def _outside(self, frame: Any) -> Origin:
        module, code, line = "", None, 0
        while frame is not None and frame.f_code is not _RUN:
            if code is None and _is_user_code(frame.f_code):
                code, line = frame.f_code, frame.f_lineno
            if frame.f_code is _MODULE_CALL and not module:
                known = self.modules.get(id(frame.f_locals.get("self")))
                module = known[0] if known is not None else ""
            frame = frame.f_back
        return Origin(module, code, line)

    def finish(self) -> None:
        """Flags that are known only at the end."""
        for tensor in self._keep:
            if (ref := self._refs.get(id(tensor))) is not None:
                self.tensors[ref.id].requires_grad = tensor.requires_grad


_MODULE_CALL = nn.Module._call_impl.__code__
_FUNCTION_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif not isinstance(x, (str, int, float)) and isinstance(x, Iterable):
        for e in x:
            yield from _tensors(e)


def _written(info: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for position, name in info.writes:
        yield from _tensors(args[position] if position < len(args) else kwargs.get(name))


class _Calls(TorchDispatchMode):
    """Hands every call of the dispatcher to the recorder."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # True, the default, wraps __torch_dispatch__ so that its first call imports torch._dynamo: half a second.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._recorder.call(func, args, kwargs or {})


_READS_DATA = "its values leave for Python or NumPy"
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
    torch.Tensor.set_: "replaces a tensor's memory",
    torch.Tensor.apply_: _READS_DATA,
    torch.Tensor.map_: _READS_DATA,
}


class _Functions(TorchFunctionMode):
    """Watches what never reaches the dispatcher, and takes some functions as one call."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        recorder = self._recorder
        if (reason := _WATCHED.get(func)) is not None and not self._constant(args):
            recorder.refuse(_name(func), reason)
        elif getattr(func, "__self__", None) is torch.Tensor.data and not self._constant(args):
            recorder.refuse("Tensor.data", "reads or writes a value past autograd")
        elif func is torch.tensor and type(args[0] if args else kwargs["data"]).__module__ == "numpy":
            recorder.refuse("torch.tensor", "reads a NumPy array, whose values would be frozen")
        elif (name := _macro(func, args, kwargs)) is not None:
            return recorder.macro(name, func, args, kwargs)
        return func(*args, **kwargs)

    def _constant(self, args: Sequence[Any]) -> bool:
        """Whether the function is applied to a tensor whose values the code itself spelled out."""
        first = args[0] if args else None
        known = isinstance(first, Tensor) and id(first) in self._recorder._refs
        return known and self._recorder.kind(first) == _STATIC


def _name(func: Any) -> str:
    return str(getattr(func, "__qualname__", func)).replace("TensorBase", "Tensor")


def _macro(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """The name under which a function goes into the trace as one call: where its decomposition reads labels as data."""
    if func is torch.nn.functional.cross_entropy:
        target = args[1] if len(args) > 1 else kwargs.get("target")
        labels = isinstance(target, Tensor) and not target.is_floating_point()
        return "cross_entropy" if labels and kwargs.get("label_smoothing") else None
    if func is torch.nn.functional.one_hot:
        classes = args[1] if len(args) > 1 else kwargs.get("num_classes", -1)
        return "one_hot" if classes > 0 else None
    return None


# ---- the run --------------------------------------------------------------------------------------------------


def _run(function: Callable[..., Any], *args: Any) -> Any:
    """The frame at which origins stop."""
    return function(*args)


_RUN = _run.__code__
_lock = threading.RLock()  # parameters are swapped on the user's module: one run at a time


@contextlib.contextmanager
def _same_random_state(recorder: _Recorder) -> Iterator[None]:
    """Restore all generators; a forward that drew from Python's or NumPy's is a hazard."""
    before, python = torch.get_rng_state(), random.getstate()
    numpy = sys.modules.get("numpy")
    array = numpy.random.get_state() if numpy is not None else None
    try:
        yield
        if random.getstate() != python:
            recorder.refuse("random", "the forward draws from Python's random numbers")
        if numpy is not None and not _same_state(numpy.random.get_state(), array):
            recorder.refuse("numpy.random", "the forward draws from NumPy's random numbers")
    finally:
        torch.set_rng_state(before)
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(array)


def _same_state(a: Any, b: Any) -> bool:
    return bool((a[1] == b[1]).all()) and a[2:] == b[2:]


def _record(recorder: _Recorder, function: Callable[..., Any], *args: Any) -> Any:
    """Run the user's code under both modes."""
    try:
        with torch.inference_mode(False), torch.enable_grad(), _same_random_state(recorder):
            with _Calls(recorder), _Functions(recorder):
                result = _run(function, *args)
    except RuntimeError as error:
        if "leaf Variable that requires grad" in str(error):
            raise Unsupported("in-place write", "", f"changes a parameter in place ({error})") from error
        raise
    finally:
        recorder.undo()
    if recorder.hazard is not None and recorder.strict:  # raised before, and caught by the user's own code
        raise recorder.hazard
    return result


def _refuse_setting(model: nn.Module | None) -> None:
    """What cannot be captured, known before the run."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise Unsupported("autocast", "", "autocast is on")
    for name, m in model.named_modules() if model is not None else ():
        if m._backward_hooks or m._backward_pre_hooks:
            raise Unsupported("backward hook", name or type(m).__name__, "a module hook changes the gradient out of sight")
    hooks = torch.nn.modules.module
    if hooks._global_backward_hooks or hooks._global_backward_pre_hooks:
        raise Unsupported("backward hook", "", "a global module hook changes the gradient out of sight")


def _refuse_custom_functions(recorder: _Recorder, roots: Iterable[Tensor]) -> None:
    """Walk the autograd graph for backward passes written by hand, and for hooks that were set past our modes."""
    stack = [t.grad_fn for t in roots if t.grad_fn is not None]
    seen = set(stack)
    while stack:
        fn = stack.pop()
        if isinstance(fn, torch.autograd.function.BackwardCFunction):
            name = type(fn).__name__.removesuffix("Backward")
            where = recorder.functions.get(name, Origin())
            recorder.refuse(name, "an autograd.Function brings its own gradient", where)
        for after, _ in fn.next_functions:  # type: ignore[union-attr]
            if after is not None and after not in seen:
                seen.add(after)
                stack.append(after)


def _float_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The program's dtype: that of the first floating-point tensor."""
    dtype = next((t.dtype for t in tensors if t.is_floating_point() or t.is_complex()), torch.float32)
    if dtype not in (torch.float32, torch.float64):
        raise Unsupported(str(dtype), "", "only float32 and float64 go native")
    return dtype


def _copy(tensor: Tensor, requires_grad: bool) -> Tensor:
    copy = tensor.detach().clone()
    return copy.requires_grad_() if requires_grad and copy.is_floating_point() else copy


# ---- a model with other tensors -------------------------------------------------------------------------------

_SIMPLE = (bool, int, float, complex, str, bytes, type(None))
_Saved = tuple[nn.Module, str, dict[str, Any], dict[str, Any]]


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


def _same_value(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, _SIMPLE) and bool(a == b))


def _same_contents(a: list[Any], b: list[Any]) -> bool:
    pairs = zip(a, b, strict=True) if len(a) == len(b) else None
    if pairs is None:
        return False
    return all(
        _same_value(x, y)
        or (isinstance(x, tuple) and isinstance(y, tuple) and len(x) == len(y) == 2 and all(map(_same_value, x, y)))
        for x, y in pairs
    )


class _Swapped:
    """The model with copies for parameters and buffers; on leaving, everything is as before, and what the forward changed
    of its modules' attributes is a hazard."""

    def __init__(self, model: nn.Module, recorder: _Recorder) -> None:
        self._model, self._recorder = model, recorder
        self._saved: list[_Saved] = []
        self._stores: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any], str]] = []

    def enter(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Swap; returns the copies by leaf key, tied ones once."""
        recorder, leaves = self._recorder, {}
        copies: dict[int, Tensor] = {}
        for path, module in self._model.named_modules():
            self._save(module, path)
            for kind, store, given in (
                ("param", module._parameters, params),
                ("buffer", module._buffers, buffers),
            ):
                before = dict(store)
                for name, own in before.items():
                    if own is None:
                        continue
                    full = f"{path}.{name}" if path else name
                    copy = copies.get(id(own))
                    if copy is None:
                        value = given.get(full, own)
                        copy = copies[id(own)] = _copy(value, kind == "param" or value.requires_grad)
                        leaves[f"{kind}/{full}"] = copy
                        if own.layout is torch.strided:
                            recorder.originals[own.untyped_storage()._cdata] = full
                    store[name] = copy  # type: ignore[assignment]
                self._hide_counter(module, path)
                self._stores.append((store, before, dict(store), path))
        for key, copy in leaves.items():
            recorder.leaf(key, copy)
        return leaves

    def _hide_counter(self, module: nn.Module, path: str) -> None:
        """A layer that sees no counter of batches takes no step that depends on it: statistics are folded elsewhere."""
        if isinstance(module, _NormBase) and module.training and module.running_mean is not None:
            counted = module._buffers.get("num_batches_tracked") is not None
            if path not in self._recorder.momenta:
                cumulative = module.momentum is None
                self._recorder.momenta[path] = (None if counted else 0.0) if cumulative else float(module.momentum or 0.0)
            if counted:
                module._buffers["num_batches_tracked"] = None

    def _save(self, module: nn.Module, path: str) -> None:
        plain = {k: v for k, v in module.__dict__.items() if k not in ("_parameters", "_buffers")}
        containers = {k: c for k, v in plain.items() if (c := _contents(v)) is not None}
        self._saved.append((module, path, plain, containers))

    def leave(self) -> str | None:
        """Restore; returns the path of the first attribute that had changed."""
        changed: list[str] = []
        for store, before, swapped, path in self._stores:
            for name in {*store, *swapped}:
                if store.get(name) is not swapped.get(name):
                    changed.append(f"{path}.{name}" if path else name)
            store.clear()
            store.update(before)
        for module, path, plain, containers in self._saved:
            now = module.__dict__
            for name in [k for k in now if k not in plain and k not in ("_parameters", "_buffers")]:
                changed.append(f"{path}.{name}" if path else name)
                del now[name]
            for name, value in plain.items():
                if name not in now or not _same_value(now[name], value):
                    changed.append(f"{path}.{name}" if path else name)
                    now[name] = value
            for name, contents in containers.items():
                if not _same_contents(_contents(plain[name]), contents):
                    changed.append(f"{path}.{name}" if path else name)
                    _refill(plain[name], contents)
        return changed[0] if changed else None


# ---- public ---------------------------------------------------------------------------------------------------


def _run_model(
    recorder: _Recorder,
    model: nn.Module,
    objective: Callable[[nn.Module, Any], Any],
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    batch: Any,
    batch_keys: Sequence[str],
) -> tuple[Any, dict[str, Tensor]]:
    """Run the objective on the swapped model; returns its result and the leaves by key."""
    flat, spec = pytree.tree_flatten(batch)
    recorder.dtype = _float_dtype([*params.values(), *(t for t in flat if isinstance(t, Tensor))])
    swapped = _Swapped(model, recorder)
    keys = iter(batch_keys)
    with _lock:
        try:
            leaves = swapped.enter(params, buffers)
            for i, t in enumerate(flat):
                if isinstance(t, Tensor):
                    key = next(keys)
                    flat[i] = leaves[key] = _copy(t, t.requires_grad)
                    recorder.leaf(key, flat[i])
            result = _record(recorder, objective, model, pytree.tree_unflatten(flat, spec))
        finally:
            changed = swapped.leave()
    if changed is not None:
        recorder.refuse("attribute", f"the forward changes its module: {changed}", Origin())
    return result, leaves


def capture(
    model: nn.Module,
    objective: Callable[[nn.Module, Any], Any],
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    batch: Any,
    batch_keys: Sequence[str],
    known: Mapping[str, Tensor] | None = None,
) -> Trace:
    """Run `objective(model, batch)` once and write down what it does.

    **Arguments**: `params`, `buffers` by first name, as they shall be read (copies are made); `batch`, one task's tensors
    in any nesting, and `batch_keys`, the leaf key of each in flattened order; `known`, keys of tensors that are expected
    outside the arguments (others are named `extern/<id>`). **Returns** a Trace. **Raises** `Unsupported` where a replay
    would not be the run, `InputError` and `InputTypeError` for a loss that is no scalar.
    """
    _refuse_setting(model)
    recorder = _Recorder(model, known=known)
    result, leaves = _run_model(recorder, model, objective, params, buffers, batch, batch_keys)
    loss, outputs = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    _check_loss(loss)
    flat, spec = pytree.tree_flatten(outputs) if outputs is not None else ([], None)
    named = {f"output/{i}": t for i, t in enumerate(flat) if isinstance(t, Tensor)}
    _refuse_custom_functions(recorder, [loss, *named.values()])
    refs = {name: recorder.ref(t, "return") for name, t in named.items()}
    trace = _trace(recorder, refs, spec, recorder.ref(loss, "return"))
    trace.loss, trace._root = loss.detach(), loss
    trace._leaves = leaves | {k: t for k, t in recorder.externs if t.requires_grad}
    return trace


def capture_function(
    function: Callable[[dict[tuple[str, str], Tensor]], Mapping[str, Tensor]],
    inputs: Mapping[tuple[str, str], Tensor],
) -> Trace:
    """Run `function`, which maps tensors by (role, name) to tensors by name, once, and write down what it does.

    Floating-point inputs require grad during the run, so that hand-written gradients are found. **Raises** `Unsupported`.
    """
    _refuse_setting(None)
    recorder = _Recorder(None)
    recorder.dtype = _float_dtype(inputs.values())
    copies = {at: _copy(t, True) for at, t in inputs.items()}
    for (role, name), copy in copies.items():
        recorder.leaf(f"{role}/{name}", copy)
    with _lock:
        results = dict(_record(recorder, function, dict(copies)))
    for name, result in results.items():
        if not isinstance(result, Tensor):
            raise Unsupported("return", "", f"{name} is a {type(result).__name__}, not a tensor")
    _refuse_custom_functions(recorder, results.values())
    return _trace(recorder, {name: recorder.ref(t, "return") for name, t in results.items()}, None, None)


def find_externs(
    model: nn.Module,
    objective: Callable[[nn.Module, Any], Any],
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    batch: Any,
) -> list[Tensor]:
    """The tensors that a loss reads from outside its arguments, in order of first use, whatever else the loss does.

    Tensors that require grad and others; hazards are passed over, and nothing is changed.
    """
    recorder = _Recorder(model, strict=False)
    count = sum(isinstance(t, Tensor) for t in pytree.tree_leaves(batch))
    _run_model(recorder, model, objective, params, buffers, batch, [f"batch/{i}" for i in range(count)])
    return [t for _, t in recorder.externs]


def _trace(recorder: _Recorder, outputs: dict[str, Ref], spec: Any, loss: Ref | None) -> Trace:
    recorder.finish()
    r = recorder
    return Trace(r.calls, r.tensors, r.dtype, loss, outputs, spec, r.externs, r.stats)


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Tensor):
        raise InputTypeError(
            message("objective(model, batch)", type(loss).__name__, "a scalar tensor", "return the loss itself")
        )
    if loss.dim() != 0:
        got = f"a tensor of shape {tuple(loss.shape)}"
        raise InputError(message("objective(model, batch)", got, "a scalar loss", "reduce it (loss.mean())"))
