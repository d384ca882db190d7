"""Who is transforming a call: torch.func, forward-mode autograd, torch.compile."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch.autograd import forward_ad

__all__ = ["eagerly", "outside_compile", "traced", "tracing", "transformed"]

Function = TypeVar("Function", bound=Callable[..., Any])


def _perhaps() -> bool:
    """For a PyTorch that does not say."""
    return True


transformed: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", _perhaps)
"""Whether a torch.func transform (grad, vmap, jvp, functionalize) is active."""


def tracing() -> bool:
    """Whether gradients may be wanted that `requires_grad` does not show: a transform, or forward-mode autograd."""
    return transformed() or getattr(forward_ad, "_current_level", 0) >= 0


def traced() -> bool:
    """Whether tensors may stand for values that are not there: make_fx, torch.export, linearize, a fake mode; or their
    uses are written down for other values: torch.jit.trace, which ends the process at a call of ours."""
    if torch._C._is_tracing():
        return True
    if not torch._C._len_torch_dispatch_stack():
        return False
    return any(torch._C._get_dispatch_mode(key) is not None for key in _TRACERS)


_KEYS = torch._C._TorchDispatchModeKey
_TRACERS = (_KEYS.PROXY, _KEYS.FAKE, _KEYS.FUNCTIONAL)


def _watched() -> bool:
    """Whether dynamo looks at every Python frame that runs now."""
    if "torch._dynamo" not in sys.modules:
        return False
    callback = getattr(getattr(torch._C, "_dynamo", None), "eval_frame", None)
    current = getattr(callback, "get_eval_frame_callback", None)
    return current is None or current() is not None


def eagerly() -> contextlib.AbstractContextManager[Any]:
    """What `torch.compile` has wrapped, a model or a loss, runs as it was written.

    Dynamo would look at the frames of our modes as well, and what it makes of a model has no second derivative. The
    setting is the process's: to be entered under a lock.
    """
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


def outside_compile(function: Function) -> Function:
    """Break the graph of torch.compile around `function`, and run it, and all it calls, as it is.

    The autograd engine may call back from a compiled step too, where `is_compiling` is false, but dynamo still watches
    for frames to compile: it is switched off for the call.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or _watched():
            from .uncompiled import run

            return run(function, *args, **kwargs)
        return function(*args, **kwargs)

    return cast(Function, call)
