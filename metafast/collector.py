"""The garbage collector waits while a plan is made.

Planning makes some ten thousand small objects, all of which live on or go by reference count. Left alone, the collector
looks through them again and again, and once through everything that torch holds: 50 to 100 ms of one first call.
"""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator

__all__ = ["waiting"]

_owed = False  # whether somebody will enable it again


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """No collection inside; afterwards as before."""
    global _owed
    if not gc.isenabled():
        yield
        return
    gc.disable()
    _owed = True
    try:
        yield
    finally:
        _owed = False
        gc.enable()


def _in_child() -> None:
    """Who would enable it may be a thread that does not exist here."""
    global _owed
    if _owed:
        _owed = False
        gc.enable()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
