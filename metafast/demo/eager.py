"""The same meta-training step as plain PyTorch, the way it is usually written: the yardstick of the demo.

Nothing of metafast is used here. For each task the inner loop is taken with `torch.autograd.grad`, keeping the graph,
and the query loss is differentiated through all of it (Finn et al., arXiv:1703.03400, algorithm 2).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

Batch = tuple[Tensor, Tensor]


def adapt(model: nn.Module, support: Batch, inner_lr: float, steps: int, order: int) -> dict[str, Tensor]:
    """Parameters after `steps` of gradient descent on one task's support; order 1 makes the gradients constants."""
    x, y = support
    fast: dict[str, Tensor] = dict(model.named_parameters())
    for _ in range(steps):
        loss = F.cross_entropy(functional_call(model, fast, (x,)), y)
        gradients = torch.autograd.grad(loss, list(fast.values()), create_graph=order == 2)
        fast = {name: p - inner_lr * g for (name, p), g in zip(fast.items(), gradients, strict=True)}
    return fast


def meta_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    support: Batch,
    query: Batch,
    *,
    inner_lr: float,
    steps: int,
    order: int,
) -> float:
    """One step of `optimizer` on the mean query loss of the tasks; returns that loss.

    **Arguments**: `support`, `query`: x: (T, n, *features), y: (T, n). Each task's graph is freed before the next one
    is built, so memory does not grow with T.
    """
    tasks = len(support[0])
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for task in range(tasks):
        fast = adapt(model, (support[0][task], support[1][task]), inner_lr, steps, order)
        loss = F.cross_entropy(functional_call(model, fast, (query[0][task],)), query[1][task]) / tasks
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    optimizer.step()
    return total
