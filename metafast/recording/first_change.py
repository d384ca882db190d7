"""Which line of the user's code changes something that is only seen to have changed after the run.

Random generators, counters and attributes tell no one when they move. Where one did, the run is made once more, and
looked at after every line.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from metafast.recording.trace import Origin
from metafast.recording.users import is_user_code, origin_of

__all__ = ["FirstChange"]


class FirstChange:
    """A context: `origin` is the first line of the user's code run inside after which `holds()` does not, or None.

    `modules` maps ids of modules to their paths. Debuggers and coverage tools see nothing of what runs inside.
    """

    def __init__(self, holds: Callable[[], bool], modules: Mapping[int, str]) -> None:
        self.origin: Origin | None = None
        self._holds, self._modules = holds, modules
        self._running: dict[FrameType, int] = {}  # which line of each

    def __enter__(self) -> FirstChange:
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(self._before)
        self._running.clear()

    def _call(self, frame: FrameType, event: str, arg: Any) -> Any:
        if self.origin is not None or not is_user_code(frame.f_code):
            return None
        self._look(frame.f_back)  # the line that calls may have changed it before
        self._running[frame] = frame.f_lineno
        return self._line

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        self._look(frame)
        self._running[frame] = frame.f_lineno
        if event == "return":
            self._running.pop(frame)
        return self._line

    def _look(self, frame: FrameType | None) -> None:
        while frame is not None and frame not in self._running:
            frame = frame.f_back
        if self.origin is not None or frame is None:
            return
        with torch._C.DisableTorchFunction(), _disable_current_modes():  # type: ignore[no-untyped-call]
            if not self._holds():
                self.origin = replace(origin_of(frame, self._modules), code=frame.f_code, line=self._running[frame])
