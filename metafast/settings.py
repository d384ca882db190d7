"""Settings of the process that a plan may depend on, or a call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack

from metafast import passes

__all__ = ["places", "settings"]


def _modes() -> tuple[type, ...]:
    return tuple(map(type, _get_current_function_mode_stack())) if torch._C._len_torch_function_stack() else ()


_OF_A_PLAN: tuple[Callable[[], Any], ...] = (
    functools.partial(torch.is_autocast_enabled, "cpu"),
    torch.get_default_dtype,
    torch.are_deterministic_algorithms_enabled,
    _modes,
    passes.left_out,
)
_OF_A_CALL: tuple[Callable[[], Any], ...] = (torch.get_num_threads, torch.is_inference_mode_enabled)


def settings() -> tuple[Any, ...]:
    """Those that a plan is keyed by."""
    return tuple([read() for read in _OF_A_PLAN])


def places() -> list[tuple[str, Any, Any, Any]]:
    """Where to see, as compiled `Places` do, whether these and those that a call depends on are as they are now."""
    return [("answer", read, None, read()) for read in (*_OF_A_PLAN, *_OF_A_CALL)]
