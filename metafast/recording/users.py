"""Which code is the user's, and where in it a run is."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

from metafast.recording.trace import Origin

__all__ = ["inside_run", "is_user_code", "origin_of", "paths_of", "run"]

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_TORCH = os.path.dirname(os.path.abspath(torch.__file__)) + os.sep
_STANDARD = os.path.dirname(os.path.abspath(os.__file__)) + os.sep
_PACKAGES = tuple(os.path.join(_STANDARD, name) + os.sep for name in ("site-packages", "dist-packages"))
_MODULE_CALL = nn.Module._call_impl.__code__
_user_code: dict[CodeType, bool] = {}


def run(function: Callable[..., Any], *args: Any) -> Any:
    """Call the user's code; the frame of this function is where origins end."""
    return function(*args)


def inside_run(frame: FrameType | None) -> FrameType | None:
    """The frame, None where it is that of `run`, or where there is none."""
    return None if frame is None or frame.f_code is run.__code__ else frame


def is_user_code(code: CodeType) -> bool:
    """Whether it is neither ours nor torch's nor Python's own."""
    found = _user_code.get(code)
    if found is None:
        name = code.co_filename
        standard = name.startswith(("<frozen ", _STANDARD)) and not name.startswith(_PACKAGES)
        found = _user_code[code] = not standard and not name.startswith((_PACKAGE, _TORCH))
    return found


def paths_of(model: nn.Module) -> dict[int, str]:
    """The paths of its modules by their ids; its own class for that of the model."""
    return {id(module): path or type(module).__name__ for path, module in model.named_modules()}


def origin_of(frame: FrameType | None, modules: Mapping[int, str]) -> Origin:
    """Where a run is: the innermost module on the stack, of those whose paths are given by id, and the innermost line
    of the user's code."""
    module, code, line = "", None, 0
    while (frame := inside_run(frame)) is not None:
        here = frame.f_code
        if code is None and is_user_code(here):
            code, line = here, frame.f_lineno
        if here is _MODULE_CALL and not module:
            module = modules.get(id(frame.f_locals.get("self")), "")
        if code is not None and module:
            break
        frame = frame.f_back
    return Origin(module, code, line)
