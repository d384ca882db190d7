"""Capture: one eager run of a loss, or of an update rule, on one task's real tensors, written down as a Trace.

The run is the user's own code under two modes. A dispatch mode records every aten call with the tensors it read and
made (tensors keep their identity, so this is a graph); a function mode sees what never reaches the dispatcher. What
would make a replay of the trace differ from the run, now or with other values, raises `Unsupported`:

    values that steer Python          item, bool(tensor), tolist, nonzero, boolean masks as indices
    gradients that are not the ops'   autograd.Function, hooks, `.data`, autograd.grad or backward inside the loss
    state                             in-place writes to parameters, buffers, batches, outer tensors; changed attributes
    randomness                        dropout in training, rand, Python's or NumPy's generators

Parameters and buffers are swapped for copies on the modules themselves for the time of the run; random state, modules
and their attributes are as before afterwards, whatever happens. No part of torch that pulls in its compiler is touched:
the first capture in a process costs what the eager run costs.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metafast.checkpoints import no_checkpoints, own_graphs
from metafast.errors import InputError, InputTypeError, message
from metafast.generators import Draws
from metafast.recording.first_change import FirstChange
from metafast.recording.recorder import Recorder
from metafast.recording.swap import Swapped, copy_of
from metafast.recording.trace import Call, OpInfo, Origin, Ref, Stat, TensorInfo, Trace, Unsupported, op_info
from metafast.recording.users import run
from metafast.recording.watch import Calls, Functions
from metafast.reference import swapping
from metafast.transforms import eagerly

__all__ = ["Call", "OpInfo", "Origin", "Ref", "Stat", "TensorInfo", "Trace", "Unsupported"]
__all__ += ["capture", "capture_function", "find_externs", "op_info"]

Objective = Callable[[nn.Module, Any], Any]


def capture(
    model: nn.Module,
    objective: Objective,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    batch: Any,
    batch_keys: Sequence[str],
    known: Mapping[str, Tensor] | None = None,
) -> Trace:
    """Run `objective(model, batch)` once and write down what it does.

    **Arguments**: `params`, `buffers` by first name, as they shall be read (copies are made; all parameters require
    grad during the run); `batch`, one task's tensors in any nesting, and `batch_keys`, the leaf key of each tensor in
    flattened order; `known`, keys of tensors that are expected outside the arguments (others are named `extern/<id>`).
    **Returns** a Trace. **Raises** `Unsupported` where a replay would not be the run, `InputError` and `InputTypeError`
    for a loss that is no scalar; the model's own errors pass through.
    """
    _refuse_setting(model)
    if learned := [name for name, buffer in buffers.items() if buffer.requires_grad]:
        raise Unsupported(learned[0], "", "a buffer that requires grad")
    dtype = _float_dtype([*params.values(), *(t for t in pytree.tree_leaves(batch) if isinstance(t, Tensor))])
    recorder = Recorder(model, known=known)
    result, leaves = _run_model(recorder, model, objective, params, buffers, batch, batch_keys)
    loss, outputs = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    _check_loss(loss)
    flat, spec = pytree.tree_flatten(outputs) if outputs is not None else ([], None)
    named = {f"output/{i}": t for i, t in enumerate(flat) if isinstance(t, Tensor)}
    _refuse_custom_functions(recorder, [loss, *named.values()])
    refs = {name: recorder.ref(t, "return") for name, t in named.items()}
    trace = _trace(recorder, dtype, refs, spec, recorder.ref(loss, "return"))
    trace.loss, trace._root = loss.detach(), loss
    trace._leaves = leaves | {k: t for k, t in recorder.externs if t.requires_grad}
    return trace


def capture_function(
    function: Callable[[dict[tuple[str, str], Tensor]], Mapping[str, Tensor]],
    inputs: Mapping[tuple[str, str], Tensor],
    known: Mapping[str, Tensor] | None = None,
) -> Trace:
    """Run `function`, which maps tensors by (role, name) to tensors by name, once, and write down what it does.

    Floating-point inputs require grad during the run, so that hand-written gradients show; `known` as of `capture`.
    **Raises** `Unsupported`.
    """
    _refuse_setting(None)
    recorder = Recorder(None, known=known)
    dtype = _float_dtype(inputs.values())
    with swapping, torch.inference_mode(False), torch.enable_grad(), no_checkpoints(), own_graphs():
        copies = {at: copy_of(t, True) for at, t in inputs.items()}
        for (role, name), copy in copies.items():
            recorder.leaf(f"{role}/{name}", copy)
        results = dict(_record(recorder, function, dict(copies)))
    recorder.refuse_temporaries()
    for name, result in results.items():
        if not isinstance(result, Tensor):
            raise Unsupported("return", "", f"{name} is a {type(result).__name__}, not a tensor")
    _refuse_custom_functions(recorder, results.values())
    trace = _trace(recorder, dtype, {name: recorder.ref(t, "return") for name, t in results.items()}, None, None)
    values = {f"{role}/{name}": copy for (role, name), copy in copies.items()} | dict(trace.externs)
    values |= {f"made/{name}": result for name, result in results.items()}
    trace.values = {key: t.detach() for key, t in values.items()}
    return trace


def find_externs(
    model: nn.Module,
    objective: Objective,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    batch: Any,
) -> list[Tensor]:
    """The tensors that a loss reads from outside its arguments, in order of first use, whatever else the loss does.

    Tensors that require grad and others alike; hazards are passed over, and nothing is changed.
    """
    recorder = Recorder(model, strict=False)
    count = sum(isinstance(t, Tensor) for t in pytree.tree_leaves(batch))
    _run_model(recorder, model, objective, params, buffers, batch, [f"batch/{i}" for i in range(count)])
    return [t for _, t in recorder.externs]


# ---- the run ------------------------------------------------------------------------------------------------------


def _run_model(
    recorder: Recorder,
    model: nn.Module,
    objective: Objective,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    batch: Any,
    batch_keys: Sequence[str],
) -> tuple[Any, dict[str, Tensor]]:
    """Run the objective on the swapped model; returns its result and the leaves by key."""
    flat, spec = pytree.tree_flatten(batch)
    keys = iter(batch_keys)
    with swapping, torch.inference_mode(False), torch.enable_grad(), no_checkpoints(), own_graphs():
        swapped = Swapped(model, recorder, params, buffers)
        try:
            leaves = swapped.enter()
            for i, t in enumerate(flat):
                if isinstance(t, Tensor):
                    key = next(keys)
                    flat[i] = leaves[key] = copy_of(t, t.requires_grad)
                    recorder.leaf(key, flat[i])
            result = _record(recorder, objective, model, pytree.tree_unflatten(flat, spec))
            changed = swapped.changed()
        finally:
            swapped.leave()
        recorder.refuse_temporaries()
        if changed is not None:
            swapped = Swapped(model, Recorder(model, strict=False), params, buffers)
            again = functools.partial(objective, model, pytree.tree_unflatten(flat, spec))
            _refuse_change(recorder, model, changed, swapped, again)
    return result, leaves


def _refuse_change(
    recorder: Recorder, model: nn.Module, changed: str, swapped: Swapped, again: Callable[[], Any]
) -> None:
    """Refuse a forward that changed an attribute of its module; `swapped` is for another run of it."""
    path = changed.rpartition(".")[0]
    kind = type(model.get_submodule(path)).__name__
    at = Origin(path or kind)
    try:
        swapped.enter()
        at = _first_change(recorder, lambda: swapped.changed() is None, again) or at
    finally:
        swapped.leave()
    recorder.refuse("attribute", f"the forward changes its module: {changed} (of {kind})", at)


def _first_change(recorder: Recorder, holds: Callable[[], bool], again: Callable[[], Any]) -> Origin | None:
    """Run the user's code again, to find the line after which `holds()` does not. None where hazards are passed over:
    nobody asks for it."""
    if not recorder.strict:
        return None
    with eagerly(), contextlib.suppress(Exception), FirstChange(holds, recorder.modules) as found:
        run(again)
    return found.origin


def _record(recorder: Recorder, function: Callable[..., Any], *args: Any) -> Any:
    """Run the user's code under both modes, and set the random generators back."""
    generators = Draws.everywhere()
    try:
        with eagerly(), Calls(recorder), Functions(recorder):
            result = run(function, *args)
        if (drawn := generators.drawn()) is not None:
            generators.restore()
            at = _first_change(recorder, lambda: generators.drawn() is None, functools.partial(function, *args))
            recorder.refuse(drawn, "draws random numbers", at or Origin())
    except RuntimeError as error:
        if recorder.hazard is not None and recorder.strict:  # torch.jit's interpreter makes another error of it
            raise recorder.hazard from error
        if any(words in str(error) for words in _ONLY_HERE):
            raise Unsupported("autograd", "", f"every parameter requires grad while captured: {error}") from error
        raise
    finally:
        generators.restore()
        recorder.undo()
    if recorder.hazard is not None and recorder.strict:  # raised before, and caught by the user's own code
        raise recorder.hazard
    return result


# What PyTorch says of parameters that require grad and usually do not: the reference may still run them
_ONLY_HERE = ("leaf Variable that requires grad", "is not differentiable with respect to argument")


def _trace(recorder: Recorder, dtype: torch.dtype, outputs: dict[str, Ref], spec: Any, loss: Ref | None) -> Trace:
    recorder.finish()
    r = recorder
    return Trace(r.calls, r.tensors, dtype, loss, outputs, spec, r.externs, r.stats, r.reads, r.updates)


# ---- what is refused before and after the run ---------------------------------------------------------------------


def _refuse_setting(model: nn.Module | None) -> None:
    """What cannot be captured, known before the run."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise Unsupported("autocast", "", "autocast is on")
    reason = "a module hook changes the gradient out of sight"
    for name, m in model.named_modules() if model is not None else ():
        if m._backward_hooks or m._backward_pre_hooks:
            raise Unsupported("backward hook", name or type(m).__name__, reason)
    everywhere = torch.nn.modules.module
    if everywhere._global_backward_hooks or everywhere._global_backward_pre_hooks:
        raise Unsupported("global backward hook", "", reason)


def _refuse_custom_functions(recorder: Recorder, roots: Iterable[Tensor]) -> None:
    """Walk the autograd graph for backward passes written by hand."""
    stack: list[Any] = [t.grad_fn for t in roots if t.grad_fn is not None]
    seen = set(stack)
    while stack:
        fn = stack.pop()
        if isinstance(fn, torch.autograd.function.BackwardCFunction):
            name = type(fn).__name__.removesuffix("Backward")
            recorder.refuse(name, "an autograd.Function brings its own gradient", recorder.applied(fn))
        for after, _ in fn.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                stack.append(after)


def _float_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The program's dtype: that of the first floating-point tensor."""
    dtype = next((t.dtype for t in tensors if t.is_floating_point() or t.is_complex()), torch.float32)
    if dtype not in (torch.float32, torch.float64):
        raise Unsupported(str(dtype), "", "only float32 and float64 go native")
    return dtype


def _check_loss(loss: Any) -> None:
    place = "objective(model, batch)"
    if not isinstance(loss, Tensor):
        raise InputTypeError(message(place, type(loss).__name__, "a scalar tensor", "return the loss itself"))
    if loss.dim() != 0:
        got = f"a tensor of shape {tuple(loss.shape)}"
        raise InputError(message(place, got, "a scalar, shape ()", "reduce it (loss.mean())"))
    if not loss.is_floating_point():
        raise InputTypeError(message(place, f"a scalar of {loss.dtype}", "float32 or float64", "compute it in one"))
