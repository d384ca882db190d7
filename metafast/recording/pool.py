"""A faster way to what PyTorch's max-pool makes, bit for bit: it is the longest op of a small conv net's forward.

Where the channels of a pixel lie side by side, PyTorch's max-pool takes a vector of them at once, else one element
after the other: 7.4 against 0.5 ms for the first of conv4 on 70 Omniglot images (two threads of a Zen 5). So images are
laid out anew, a few at a time: 2.2 ms in all. The winners, their indices, NaN and equal values among them, and the
layout of the result are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_POOL = torch.ops.aten.max_pool2d_with_indices.default
_ELEMENTS = 1 << 18  # of a few images: what a second-level cache holds; below that little is gained
_CHANNELS = 8  # about a vector


def called(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `func` returns."""
    if func is _POOL and not kwargs and _pays(args[0]):
        return _pooled(*args)
    return func(*args, **kwargs)


def _pays(images: Tensor) -> bool:
    large = images.dim() == 4 and images.numel() >= _ELEMENTS and images.shape[1] >= _CHANNELS
    return large and images.device.type == "cpu" and images.is_contiguous()


def _pooled(images: Tensor, *window: Any) -> tuple[Tensor, ...]:
    few = max(1, _ELEMENTS * len(images) // images.numel())
    made: tuple[Tensor, ...] = ()
    for start in range(0, len(images), few):
        found = _POOL(images[start : start + few].contiguous(memory_format=torch.channels_last), *window)
        made = made or tuple([t.new_empty((len(images), *t.shape[1:])) for t in found])
        for whole, t in zip(made, found, strict=True):
            whole[start : start + few].copy_(t)
    return made
