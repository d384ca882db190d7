"""The garbage collector waits while a plan is made.

Planning makes some ten thousand small objects, all of which live on or go by reference count. Left alone, the collector
looks through them again and again, and once through everything that torch holds: 50 to 100 ms of one first call.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["waiting"]


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """No collection inside; afterwards as before."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
