"""Running statistics and other buffers that a forward pass writes.

The reference threads copies of the buffers through all passes of a call (`Buffers`); a native backend records batch
means and variances and folds them afterwards (`fold`). Either way the model's own buffers change once, at the end of a
call, to what the eager loop over the tasks in order would leave, and never in a replayed backward pass.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.module import register_module_forward_pre_hook

__all__ = ["Buffers", "copied", "fold", "tracked", "unmoved"]


class Buffers:
    """Copies of the buffers, written by one pass after the other, and handed back at the end.

    A buffer that requires grad is no running statistic: it is read where it lies, and receives its meta-gradient.
    """

    def __init__(self, buffers: Mapping[str, Tensor], places: Mapping[str, tuple[str, ...]]) -> None:
        self._own = buffers
        self._places = places
        self.values = dict(buffers)

    def named(self) -> dict[str, Tensor]:
        """Copies of the current values for every place of each buffer, for one pass to write.

        A pass of its own copy each: the graph of an earlier one may have saved what a later one would overwrite.
        """
        values = copied(self.values)
        return {place: value for name, value in values.items() for place in self._places.get(name, (name,))}

    def update(self, named: Mapping[str, Tensor]) -> None:
        """Note what a pass left: a buffer may have been written in place or replaced."""
        for name, value in self.values.items():
            if not value.requires_grad:
                self.values[name] = named[name].detach()

    def write_back(self) -> None:
        """Give the model what the passes left; buffers that did not change keep their version."""
        with torch.no_grad():
            for name, value in self.values.items():
                own = self._own[name]
                if own is value:
                    continue
                if own.shape != value.shape or not torch.equal(own, value):
                    own.copy_(value)


def copied(buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the buffers, except of those that require grad."""
    return {name: b if b.requires_grad else b.detach().clone() for name, b in buffers.items()}


def tracked(model: nn.Module) -> dict[str, _NormBase]:
    """The normalisation layers whose running statistics a forward pass changes now, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _NormBase) and module.training and module.running_mean is not None
    }


@contextlib.contextmanager
def unmoved(model: nn.Module) -> Iterator[None]:
    """A run that is only to look, or to replay: layers that it passes and that `model`, which runs with copies of its
    buffers, does not hold get their running statistics back.

    Nothing else of what is outside the model is restored: what a run fills once, and notes in Python that it has, is to
    stay filled.
    """
    saved: dict[int, tuple[Tensor, Tensor]] = {}
    thread, inside = threading.get_ident(), frozenset(map(id, model.modules()))

    def save(module: nn.Module, args: Any) -> None:
        if not isinstance(module, _NormBase) or id(module) in inside:
            return
        if module.training and threading.get_ident() == thread:
            for buffer in module.buffers(recurse=False):
                saved.setdefault(id(buffer), (buffer, buffer.detach().clone()))

    hook = register_module_forward_pre_hook(save)
    try:
        yield
    finally:
        hook.remove()
        with torch.no_grad():
            for buffer, before in saved.values():
                buffer.copy_(before)


def fold(module: _NormBase, means: Tensor, variances: Tensor) -> None:
    """Fold the statistics of several passes into a layer's running ones, in place.

    With momentum m (a cumulative average, m = 1/n for the n-th batch ever, where `momentum` is None) each pass does
    running <- (1 - m) running + m batch; over p passes this is one weighted sum.

    **Arguments**: `means`, `variances` `(p, C)`, the unbiased variance, in the order in which the eager loop would have
    made the passes.
    """
    passes = means.shape[0]
    if not passes:  # no step was made
        return
    assert module.running_mean is not None and module.running_var is not None
    seen = 0
    if module.num_batches_tracked is not None:
        seen = int(module.num_batches_tracked)
        module.num_batches_tracked.add_(passes)
    weights, kept = _weights(module.momentum, seen, passes)
    with torch.no_grad():
        share = torch.tensor(weights, dtype=means.dtype, device=means.device)
        for running, values in ((module.running_mean, means), (module.running_var, variances)):
            running.mul_(kept).add_(share @ values)


def _weights(momentum: float | None, seen: int, passes: int) -> tuple[list[float], float]:
    """The weight of each pass in the final running value, and that of the old one. They add up to 1, but what is left
    of that has no right digit where the old one's share is small."""
    if momentum is None:  # each of the seen + passes batches weighs the same
        return [1.0 / (seen + passes)] * passes, seen / (seen + passes)
    return [momentum * (1.0 - momentum) ** (passes - 1 - i) for i in range(passes)], (1.0 - momentum) ** passes
