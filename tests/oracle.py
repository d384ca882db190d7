"""The oracle: an eager loop of torch.autograd.grad over tasks and steps, with nothing of metafast in it.

It runs on a deep copy of the model, so that running statistics end in the copy, as the loop left them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

Objective = Callable[[nn.Module, Any], Tensor]
Params = dict[str, Tensor]
#: `(params, grads, state, hyper, k, params0) -> (params, state)`
Update = Callable[..., tuple[Params, Any]]


def sgd(params: Params, grads: Params, state: Any, hyper: Mapping[str, Any], k: Tensor, _: Params) -> Any:
    """Gradient descent with one rate `lr`, or one for each parameter."""
    lr = hyper["lr"]
    rates = lr if isinstance(lr, Mapping) else dict.fromkeys(params, lr)
    return {n: p - rates[n] * grads[n] for n, p in params.items()}, state


def no_state(params: Params, hyper: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of a rule that has none."""
    return {}


@dataclass
class Answer:
    """The losses of the tasks, the gradients of their mean, and the buffers that the loop left behind."""

    losses: Tensor
    params: dict[str, Tensor]
    hyper: dict[str, Tensor]
    externs: list[Tensor]
    data: list[Tensor]  # of the floating-point tensors of support and query, flattened
    buffers: dict[str, Tensor]
    fast: dict[str, Tensor]


class _Frame(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, objective: Objective, batch: Any) -> Tensor:
        return objective(self.model, batch)


def meta_gradient(*args: Any, **options: Any) -> Answer:
    """`eager_meta_gradient` on one thread: on arrays this small PyTorch's threads only spin."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return eager_meta_gradient(*args, **options)
    finally:
        torch.set_num_threads(before)


def eager_meta_gradient(
    model: nn.Module,
    objective: Objective,
    support: Any,
    query: Any,
    *,
    hyper: Mapping[str, Any],
    steps: int,
    order: int = 2,
    adapted: Sequence[str] | None = None,
    query_objective: Objective | None = None,
    init: Callable[..., Any] = no_state,
    update: Update = sgd,
    externs: Sequence[Tensor] = (),
    data: bool = False,
    weights: Tensor | None = None,
) -> Answer:
    """The gradient of the mean over tasks (or the sum weighted by `weights`) of the adapted query loss.

    `hyper` is a dict of tensors, or of dicts of tensors; every one gets its gradient. `adapted` are names of
    parameters, all if None; `data` asks for the gradient of the batches too.
    """
    model = copy.deepcopy(model)
    frame = _Frame(model)
    leaves = {n: p.detach().requires_grad_() for n, p in model.named_parameters()}
    names = list(leaves) if adapted is None else list(adapted)
    hyper = pytree.tree_map(lambda t: t.detach().clone().requires_grad_(), dict(hyper))
    support, query = pytree.tree_map(
        lambda t: t.detach().clone().requires_grad_(data and t.is_floating_point()), (support, query)
    )
    batches = [t for t in pytree.tree_leaves((support, query)) if t.requires_grad]

    def loss_of(function: Objective, params: Params, batch: Any) -> Tensor:
        # BatchNorm writes its statistics in place: each pass writes buffers of its own
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        values = {f"model.{n}": t for n, t in {**leaves, **params, **buffers}.items()}
        loss = functional_call(frame, values, (function, batch))
        with torch.no_grad():
            for n, b in model.named_buffers():
                b.copy_(buffers[n])
        return loss

    losses, fast = [], []
    for t in range(len(pytree.tree_leaves(support)[0])):
        here, there = pytree.tree_map(lambda x, t=t: x[t], (support, query))
        start = {n: leaves[n] for n in names}
        params, state = dict(start), init(start, hyper)
        for k in range(steps):
            loss = loss_of(objective, params, here)
            grads = torch.autograd.grad(
                loss, list(params.values()), create_graph=order == 2, allow_unused=True, materialize_grads=True
            )
            step = torch.tensor(float(k), dtype=loss.dtype)
            params, state = update(params, dict(zip(params, grads, strict=True)), state, hyper, step, start)
        losses.append(loss_of(query_objective or objective, params, there))
        fast.append(params)

    meta = torch.stack(losses).mean() if weights is None else (torch.stack(losses) * weights).sum()
    flat = pytree.tree_leaves(hyper)
    wanted = [*leaves.values(), *flat, *externs, *batches]
    found = torch.autograd.grad(meta, wanted, allow_unused=True)
    full = [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found, strict=True)]
    n_params, n_flat, n_externs = len(leaves), len(flat), len(externs)
    return Answer(
        losses=torch.stack(losses).detach(),
        params=dict(zip(leaves, full[:n_params], strict=True)),
        hyper=dict(zip(_names(hyper), full[n_params : n_params + n_flat], strict=True)),
        externs=full[n_params + n_flat : n_params + n_flat + n_externs],
        data=full[n_params + n_flat + n_externs :],
        buffers={n: b.clone() for n, b in model.named_buffers()},
        fast={n: torch.stack([f[n] for f in fast]).detach() for n in names},
    )


def _names(hyper: Mapping[str, Any]) -> list[str]:
    """lr, or lr.<parameter> where there is one for each, in the order of pytree leaves."""
    paths, _ = pytree.tree_flatten_with_path(hyper)
    return [".".join(str(key.key) for key in path) for path, _ in paths]
