"""Activation checkpointing inside a model whose parameters are swapped for the time of a call, and around a call.

`torch.utils.checkpoint` runs a part of the model again during backward. By then the parameters that it ran with are no
longer on the modules: PyTorch would differentiate at another point, and not say so. Around a call, it would run the
call again wherever a graph inside it, which lives no longer than the call, asks for what it saved.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils import checkpoint

__all__ = ["no_checkpoints", "own_graphs", "saving_hooks"]


_REENTRANT, _OTHER = "CheckpointFunction", "_checkpoint_without_reentrant_generator"


@contextlib.contextmanager
def no_checkpoints() -> Iterator[None]:
    """In this thread a checkpoint only calls its function: the graph keeps what the function computed."""
    here = threading.get_ident()

    def here_only(plain: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (plain if threading.get_ident() == here else original)(*args, **kwargs)

    before = {name: getattr(checkpoint, name) for name in (_REENTRANT, _OTHER) if hasattr(checkpoint, name)}
    if _REENTRANT in before:
        setattr(checkpoint, _REENTRANT, SimpleNamespace(apply=here_only(_call, before[_REENTRANT].apply)))
    if _OTHER in before:
        setattr(checkpoint, _OTHER, here_only(_nothing_around, before[_OTHER]))
    try:
        yield
    finally:
        for name, original in before.items():
            setattr(checkpoint, name, original)


def saving_hooks() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """The innermost hooks that what autograd saves passes through now."""
    hooks: tuple[Callable[..., Any], Callable[..., Any]] | None
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # type: ignore[attr-defined]
    return hooks


def own_graphs() -> contextlib.AbstractContextManager[Any]:
    """Graphs made inside keep what they save as it is, whatever hooks for saved tensors stand around the call."""
    if saving_hooks() is None:
        return contextlib.nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_same, _same)


def _same(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _call(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
    return function(*args)


def _nothing_around(*args: Any, **kwargs: Any) -> Iterator[None]:
    yield  # between what would come before the function and what after
