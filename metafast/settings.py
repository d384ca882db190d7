"""Settings of the process that a plan may depend on, or a call."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack

from metafast import passes

__all__ = ["places", "settings"]


def settings() -> tuple[Any, ...]:
    """Those that a plan is keyed by."""
    modes = tuple(map(type, _get_current_function_mode_stack())) if torch._C._len_torch_function_stack() else ()
    return (
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch._C._get_deterministic_algorithms(),
        modes,
        passes.left_out(),
    )


def places() -> list[tuple[str, Any, Any, Any]]:
    """Where to see, as compiled `Places` do, whether these and those that a call depends on are as they are now."""
    read = (settings, torch.get_num_threads, torch.is_inference_mode_enabled)
    return [("answer", each, None, each()) for each in read]
