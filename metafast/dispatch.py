"""Which backend takes a problem."""

from __future__ import annotations

from .errors import BackendError, message
from .problem import Backend, Problem
from .reference import Reference

__all__ = ["choose", "explain"]


def choose(problem: Problem, backend: str) -> Backend:
    """The backend for `problem`: `backend` is "auto", "native", "cuda" or "torch"."""
    if backend in ("auto", "torch"):
        return Reference()
    raise BackendError(message("InnerLoop(backend=...)", repr(backend), "one that is built in", 'use backend="auto"'))


def explain(problem: Problem, backend: str) -> str:
    """Which backend takes `problem`, and why, as text."""
    chosen = choose(problem, backend)
    return f"backend: {chosen.name} (asked for {backend!r})"
