"""The recorder: tensors by identity, calls in order, and everything that would make a replay differ from the run."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.nn.modules.batchnorm import _BatchNorm

from metafast.checkpoints import saving_hooks
from metafast.recording.pool import called
from metafast.recording.trace import Call, OpInfo, Origin, Ref, Stat, TensorInfo, Unsupported, extern_key, op_info
from metafast.recording.users import inside_run, origin_of, paths_of

_LIFT = {"lift", "lift_fresh"}
_SHAPE_ONLY = {"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"}
_SHAPE_ONLY |= {"new_empty_strided"}
_OF_SHAPES = {"is_same_size", "_has_same_storage_numel"}  # Python values that do not depend on the data
# The position of the flag for training mode among the arguments, None where the op is for training mode only
_BATCH_NORM: dict[str, int | None] = {"native_batch_norm": 5, "cudnn_batch_norm": 5, "miopen_batch_norm": 5}
_BATCH_NORM |= {"_native_batch_norm_legit": 5, "_batch_norm_with_update": None}

_STATIC, _VALUE = "static", "value"  # what a storage holds, unless it holds a leaf: then its key

_LAYER_FORWARD = _BatchNorm.forward.__code__


class Recorder:
    """Writes down one run.

    `strict` raises at the first hazard; else hazards are passed over, and only what is found outside matters. A storage
    is *static* while everything in it is made of what the code spelled out: values of such tensors may steer Python.
    """

    def __init__(
        self, model: nn.Module | None, *, strict: bool = True, known: Mapping[str, Tensor] | None = None
    ) -> None:
        self.strict = strict
        self.calls: list[Call] = []
        self.tensors: list[TensorInfo] = []
        self.stats: list[Stat] = []
        self.externs: list[tuple[str, Tensor]] = []
        self.hazard: Unsupported | None = None
        self.reads: dict[str, tuple[str, Origin]] = {}  # buffers, by the op that first reads their values
        self.updates: set[str] = set()  # buffers that BatchNorm updates
        self.momenta: dict[str, float | None] = {}  # layers with running statistics, by path
        self.originals: dict[int, str] = {}  # storages of the model's own parameters and buffers
        self.modules = paths_of(model) if model is not None else {}
        self._known = {id(t): key for key, t in (known or {}).items()}
        self._task = torch._C._current_graph_task_id()  # a call may itself be part of a backward pass: a checkpoint's
        self._paused = False
        self._refs: dict[int, Ref] = {}
        self._keep: list[Tensor] = []  # every tensor seen: identities and storages stay unique
        self._storages: dict[int, str] = {}
        self._undo: list[tuple[Tensor, Tensor]] = []
        # By position in `tensors`, of those made without autograd
        self._stacks: dict[int, list[tuple[CodeType, Origin]]] = {}

    # -- tensors

    def leaf(self, key: str, tensor: Tensor) -> Ref:
        """Declare a tensor that comes from outside."""
        return self._add(tensor, TensorInfo(tuple(tensor.shape), tensor.dtype, key), key)

    def ref(self, tensor: Tensor, op: str, *, updates: bool = False) -> Ref:
        """The Ref of a tensor that an op reads, or only updates; an unknown one was found outside."""
        found = self._refs.get(id(tensor))
        if found is None:
            self._refuse_stranger(tensor, op)
            key = self._known.get(id(tensor)) or extern_key(tensor)
            self.externs.append((key, tensor))
            return self.leaf(key, tensor)
        if not updates and (kind := self.kind(tensor)).startswith("buffer/") and kind not in self.reads:
            self.reads[kind] = op, self.origin()
        return found

    def kind(self, tensor: Tensor) -> str:
        """What a known tensor's memory holds: a leaf's key, "static" or "value"."""
        return self._storages.get(_storage(tensor), _VALUE)

    def is_static(self, tensor: Tensor) -> bool:
        """Whether it is made of nothing but what the code spelled out."""
        return id(tensor) in self._refs and self.kind(tensor) == _STATIC

    def finish(self) -> None:
        """Note which tensors require grad, which is known only at the end."""
        for tensor in self._keep:
            if (ref := self._refs.get(id(tensor))) is not None:
                self.tensors[ref.id].requires_grad = tensor.requires_grad

    def refuse_temporaries(self) -> None:
        """Refuse a tensor found outside that nobody else holds: it was made during the run, out of sight."""
        probe = ("", torch.empty(0))
        keep = [probe[1]]
        alone = max(sys.getrefcount(tensor) for _, tensor in [probe])
        del keep
        for _, tensor in self.externs:
            if sys.getrefcount(tensor) <= alone:
                self.refuse("extern", "reads a tensor made out of sight (frombuffer?), whose values would be frozen")

    def undo(self) -> None:
        """Give tensors found outside their values back."""
        with torch.no_grad():
            for tensor, before in reversed(self._undo):
                tensor.copy_(before)

    def _add(self, tensor: Tensor, info: TensorInfo, kind: str) -> Ref:
        ref = self._refs[id(tensor)] = Ref(len(self.tensors))
        self.tensors.append(info)
        self._keep.append(tensor)
        self._storages.setdefault(_storage(tensor), kind)
        return ref

    def _refuse_stranger(self, tensor: Tensor, op: str) -> None:
        """Hazards of a tensor that no recorded call made."""
        if type(tensor) not in (Tensor, nn.Parameter):
            return self.refuse(op, f"reads a {type(tensor).__name__}, a subclass of Tensor")
        if tensor.layout is not torch.strided:
            return self.refuse(op, f"reads a tensor of layout {tensor.layout}")
        storage = _storage(tensor)
        shared = self._storages.get(storage)
        if shared is not None and not shared.startswith("extern/"):
            what = shared if "/" in shared else "a value of the loss"
            self.refuse(op, f"reads memory of {what} past autograd (`.data`, nn.Parameter(value), set_)")
        elif storage in self.originals:
            name = self.originals[storage]
            self.refuse(op, f"reads {name} past its module's attribute, where an adapted value does not reach")

    def _result(self, tensor: Tensor, kind: str) -> Ref:
        """The Ref of what an op returned: its argument, for one in place."""
        found = self._refs.get(id(tensor))
        return self._add(tensor, TensorInfo(tuple(tensor.shape), tensor.dtype), kind) if found is None else found

    # -- calls

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make one call of the dispatcher, and write it down."""
        if self._paused:
            return func(*args, **kwargs)
        if isinstance(func, HigherOrderOperator):
            self.refuse(func.name(), "an operator on functions (torch.cond, map, scan) has no native form")
            return func(*args, **kwargs)
        info = op_info(func)
        if info.base in _LIFT and id(args[0]) not in self._refs:
            return self._lift(info, func, args[0])
        refs = self._read(info.name, args, kwargs, updates=_updates_statistics(info, args))
        static = all(self.kind(t) == _STATIC for t in tensors_of((args, kwargs.values())))
        self._refuse_before(info, args, kwargs, static)
        before = _layout(args[0]) if info.reshapes else None
        out = self._draw(info, func, args, kwargs) if info.random else called(func, args, kwargs)
        if before is not None and _layout(out) == before:  # as adaptive_avg_pool2d(1) lays out channels-last results
            return out
        if not static:
            self._spoil(info, args, kwargs)
        if not isinstance(out, (Tensor, list, tuple)):
            if out is not None and not static and info.base not in _OF_SHAPES:
                self.refuse(info.name, "its result is a Python value that depends on the data")
            return out
        if info.reshapes:
            del self._refs[id(out)]  # the same object, another tensor
        self._write(info.name, func, refs, out, _STATIC if static or info.base in _SHAPE_ONLY else _VALUE)
        return out

    def macro(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make a call above the dispatcher, and write it down as one."""
        refs = self._read(name, args, kwargs)
        self._paused = True
        try:
            out = func(*args, **kwargs)
        finally:
            self._paused = False
        self._write(name, None, refs, out, _VALUE)
        return out

    def _read(
        self, op: str, args: Any, kwargs: dict[str, Any], *, updates: bool = False
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def ref(tensor: Tensor) -> Ref:
            return self.ref(tensor, op, updates=updates)

        return tuple(_map(a, ref) for a in args), {k: _map(v, ref) for k, v in kwargs.items()}

    def _write(self, name: str, func: Any, refs: tuple[tuple[Any, ...], dict[str, Any]], out: Any, kind: str) -> None:
        grad = torch.is_grad_enabled()
        outputs = _map(out, lambda t: self._result(t, kind))
        origin = self.origin()
        if not grad:
            self._note_stack(outputs)
        self.calls.append(Call(name, func, *refs, outputs, grad, origin))

    def _lift(self, info: OpInfo, func: Any, tensor: Tensor) -> Any:
        """`torch.tensor(...)`: values that the code spelled out."""
        if not tensor.untyped_storage().resizable():
            self.refuse(info.name, "reads a NumPy array or a buffer, whose values would be frozen")
        out = func(tensor)
        self._keep.append(tensor)
        self._add(out, TensorInfo(tuple(out.shape), out.dtype, literal=out.detach().clone()), _STATIC)
        return out

    def _draw(self, info: OpInfo, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An op that may draw random numbers, and must not (dropout with p = 0 does not)."""
        if any(isinstance(a, torch.Generator) for a in (*args, *kwargs.values())):
            self.refuse(info.name, "draws random numbers")
        before = torch.get_rng_state()
        out = func(*args, **kwargs)
        elsewhere = any(t.device.type != "cpu" for t in tensors_of(out))
        if elsewhere or not torch.equal(before, torch.get_rng_state()):
            self.refuse(info.name, "draws random numbers")
        return out

    # -- hazards

    def refuse(self, op: str, reason: str, origin: Origin | None = None) -> None:
        """Note a hazard, and raise it unless hazards are passed over."""
        error = Unsupported(op, origin if origin is not None else self.origin(), reason)
        if self.hazard is None:
            self.hazard = error
        if self.strict:
            raise error

    def _refuse_before(self, info: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any], static: bool) -> None:
        if torch._C._current_graph_task_id() != self._task:
            self.refuse(info.name, "a gradient is taken inside the loss (autograd.grad or backward)")
        if _packed_by_the_user():
            self.refuse(info.name, "hooks for saved tensors may change the gradient out of sight")
        if info.steers and not static:
            self.refuse(info.name, "its result steers Python, or has a shape that depends on the data")
        if info.base.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple)):
            masks = [t for t in tensors_of(args[1]) if t.dtype in (torch.bool, torch.uint8)]
            if any(self.kind(t) != _STATIC for t in masks):
                self.refuse(info.name, "a boolean mask as index makes a shape that depends on the data")
        for tensor in _written(info, args, kwargs):
            kind = self.kind(tensor)
            if "/" in kind:
                self.refuse(info.name, f"changes {_named(kind)} in place")
                self._undo.append((tensor, tensor.detach().clone()))
        if _updates_statistics(info, args):
            self._batch_norm(info, args)

    def _spoil(self, info: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Constants that something else was written into are constants no more."""
        for tensor in _written(info, args, kwargs):
            if self._storages.get(_storage(tensor)) == _STATIC:
                self._storages[_storage(tensor)] = _VALUE

    def _batch_norm(self, info: OpInfo, args: tuple[Any, ...]) -> None:
        """Note the running statistics that a pass in training mode updates."""
        keys = [self.tensors[self._refs[id(t)].id].key or "" for t in args[3:5]]
        path = keys[0].removeprefix("buffer/").rpartition(".")[0]
        flag = _BATCH_NORM[info.base]
        momentum = args[5 if flag is None else flag + 1]
        if path not in self.momenta or not self._layer_runs(path, keys) or momentum != (self.momenta[path] or 0.0):
            self.refuse(info.name, "updates running statistics otherwise than the BatchNorm module that they belong to")
            return
        self.updates.update([*keys, keys[0].removesuffix("running_mean") + "num_batches_tracked"])
        count = args[0].numel() // max(args[0].shape[1], 1)
        earlier = sum(s.path == path for s in self.stats)
        stat = Stat(path, f"stat/{path}/{earlier}", self.momenta[path], count, len(self.calls))
        self.stats.append(stat)

    def _layer_runs(self, path: str, keys: list[str]) -> bool:
        """Whether those are the statistics of the layer at `path`, and its own forward, which also counts, runs now."""
        frame: Any = sys._getframe(1)
        while (frame := inside_run(frame)) is not None and frame.f_code is not _LAYER_FORWARD:
            frame = frame.f_back
        layer = frame.f_locals.get("self") if frame is not None else None
        start = f"buffer/{path}." if path else "buffer/"
        own = [start + "running_mean", start + "running_var"]
        return keys == own and self.modules.get(id(layer)) == (path or type(layer).__name__)

    # -- origins

    def origin(self, frame: Any = None) -> Origin:
        """Where the run is: the innermost module of the model on the stack, and the innermost line of user code."""
        return origin_of(sys._getframe(1) if frame is None else frame, self.modules)

    def applied(self, node: Any) -> Origin:
        """Where the autograd.Function of a node in the graph was applied, which the node does not know.

        Its forward is on the stack of the call that made its result; or is not, where it returns its argument, of
        which autograd then makes a view at the place of application itself.
        """
        made = (self._refs[id(t)] for t in self._keep if id(t) in self._refs and t.grad_fn is node)
        stack = next((self._stacks[ref.id] for ref in made if ref.id in self._stacks), [])
        forward = inspect.unwrap(node._forward_cls.forward)
        inside = [i for i, (code, _) in enumerate(stack) if code is getattr(forward, "__code__", None)]
        outside = stack[inside[0] + 1 :] if inside else stack
        return outside[0][1] if outside else Origin()

    def _note_stack(self, outputs: Any) -> None:
        """Autograd is off inside an autograd.Function's forward: note from where its results were called for."""
        stack: list[tuple[CodeType, Origin]] = []
        frame: Any = sys._getframe(1)
        while (frame := inside_run(frame)) is not None:
            stack.append((frame.f_code, self.origin(frame)))
            frame = frame.f_back
        for ref in _refs(outputs):
            self._stacks[ref.id] = stack


def _packed_by_the_user() -> bool:
    """Whether what autograd saves now passes through hooks other than torch's own (checkpoints, `save_on_cpu`)."""
    hooks = saving_hooks()
    return hooks is not None and not str(getattr(hooks[0], "__module__", "")).startswith(("torch.", "metafast."))


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    """Which element lies where: the strides of dims of length 1 do not matter."""
    strides = [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]
    return tensor.shape, strides, tensor.storage_offset()


def _updates_statistics(info: OpInfo, args: tuple[Any, ...]) -> bool:
    """Whether the op writes running statistics, which not every schema says."""
    if info.base not in _BATCH_NORM or info.name.endswith(".no_stats") or args[3] is None:
        return False
    flag = _BATCH_NORM[info.base]
    return flag is None or bool(args[flag])


def _named(kind: str) -> str:
    role, _, name = kind.partition("/")
    if role == "extern":
        return "a tensor found outside"
    return {"param": f"parameter {name}", "buffer": f"buffer {name}"}.get(role, f"tensor {kind} of the batch")


def _storage(tensor: Tensor) -> int:
    """The identity of a tensor's memory; of the tensor itself where it has none of its own (sparse)."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else -id(tensor)


def _map(x: Any, f: Callable[[Tensor], Any]) -> Any:
    """Apply `f` to the tensors in (nested lists of) arguments; tuples become lists."""
    if isinstance(x, Tensor):
        return f(x)
    return [_map(e, f) for e in x] if isinstance(x, (list, tuple)) else x


def _refs(x: Any) -> Iterator[Ref]:
    if isinstance(x, Ref):
        yield x
    elif isinstance(x, list):
        for e in x:
            yield from _refs(e)


def tensors_of(x: Any) -> Iterator[Tensor]:
    """The tensors in nested lists and other iterables."""
    if isinstance(x, Tensor):
        yield x
    elif not isinstance(x, (str, int, float)) and isinstance(x, Iterable):
        for e in x:
            yield from tensors_of(e)


def _written(info: OpInfo, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for position, name in info.writes:
        yield from tensors_of(args[position] if position < len(args) else kwargs.get(name))
