"""What can fail, and what is warned of.

An error is a `MetafastError` and, beside it, the built-in exception that fits, so that `except ValueError` works.
Running out of memory, a warning made an error, and the `KeyError` and `IndexError` of `FastWeights` stay what they are.
A message reads: place, got, expected, way out; within a replay the position comes first ("task 3, inner step 2: ...").
"""

from __future__ import annotations

import os
import sys
import warnings
from types import FrameType

__all__ = [
    "BackendError",
    "DoubleBackwardError",
    "FallbackWarning",
    "InputChangedError",
    "InputError",
    "InputTypeError",
    "LabelError",
    "MetafastError",
    "NonFiniteError",
    "NonFiniteWarning",
    "TaskError",
    "TransformError",
    "calling",
    "message",
    "position",
    "warn",
]

_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep


class MetafastError(Exception):
    """Whatever metafast itself raises; `metafast.errors` holds its kinds.

    Each is a built-in exception as well: `InputError` a ValueError, `InputTypeError` a TypeError, `LabelError` both an
    InputError and an IndexError, `NonFiniteError` an ArithmeticError, the others RuntimeErrors. What the model or the
    loss raise comes as a `TaskError` with task and step.
    """


class InputError(MetafastError, ValueError):
    """An argument, a batch or an option has a value that cannot be used."""


class InputTypeError(MetafastError, TypeError):
    """An argument or a tensor has a type, dtype or device that cannot be used."""


class LabelError(InputError, IndexError):
    """A class label lies outside 0..classes-1 (and is not `ignore_index`)."""


class TaskError(InputError, RuntimeError):
    """The model, the loss or the update rule raised for one task; the message says where, and with which shapes."""


class BackendError(MetafastError, RuntimeError):
    """The backend that was asked for is not there, or cannot take this problem."""


class DoubleBackwardError(MetafastError, RuntimeError):
    """The meta-gradient itself was differentiated, which a fused call does not offer."""


class InputChangedError(MetafastError, RuntimeError):
    """Something the call had read was changed in place before its backward pass."""


class TransformError(MetafastError, RuntimeError):
    """A torch.func transform reaches the call on a way that cannot be followed."""


class NonFiniteError(MetafastError, ArithmeticError):
    """A loss became infinite or NaN, and `nonfinite="raise"` was asked for.

    The message begins with task and step. The buffers of the model are as before the call; no gradient was written.
    """


class NonFiniteWarning(RuntimeWarning):
    """A loss became infinite or NaN; it propagates as in PyTorch. The message begins with task and step."""


class FallbackWarning(UserWarning):
    """A problem runs on the PyTorch reference, because something in it cannot go native.

    Once a plan, at the line that called. The message names the op, the module's path and the user's line, and why; the
    results are those of eager PyTorch, the time is its too. `InnerLoop(backend="native")` raises `BackendError`
    instead, `backend="torch"` asks for the reference and does not warn.
    """


def message(place: str, got: object, expected: str, way_out: str) -> str:
    """The one form of a message: what is wrong where, and what to do about it."""
    return f"{place}: got {got}, expected {expected}; {way_out}"


def position(task: int, step: int, steps: int) -> str:
    """Where in a replay something happened; `step == steps` is the query loss.

    >>> position(3, 2, 5)
    'task 3, inner step 2'
    >>> position(3, 5, 5)
    'task 3, query loss'
    """
    return f"task {task}, inner step {step}" if step < steps else f"task {task}, query loss"


def warn(text: str, category: type[Warning]) -> None:
    """Warn at the line of the user's that called, not at one of ours or of torch's."""
    warnings.warn(text, category, stacklevel=calling()[1])


def calling() -> tuple[FrameType, int]:
    """The frame of the user's that called us, and how far up it is from the caller of this function."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _inside(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    return frame, level


def _inside(filename: str) -> bool:
    between = os.path.basename(filename) in ("contextlib.py", "functools.py")
    return between or filename.startswith(_HERE) or f"{os.sep}torch{os.sep}" in filename
