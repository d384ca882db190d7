"""A small net, batches for it, and its loop beside the oracle: what tests of `InnerLoop` share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metafast

TASKS, WAYS, LR = 3, 4, 0.3
backends = pytest.mark.parametrize("backend", ["torch", "auto"])


def data(seed: int = 0, examples: int = 5, features: int = 6) -> tuple[Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(TASKS, examples, features, dtype=torch.float64, generator=gen)
    return x, torch.randint(0, WAYS, (TASKS, examples), generator=gen)


def mlp() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, WAYS)).double()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, WAYS)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Reversal(torch.autograd.Function):
    """Turns the gradient around (Ganin and Lempitsky 2015)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return -cotangent


def loop(model: nn.Module, backend: str = "torch", loss: Any = F.cross_entropy, **options: Any) -> metafast.InnerLoop:
    options.setdefault("update", metafast.SGD(lr=LR))
    options.setdefault("steps", 2)
    return metafast.InnerLoop(model, loss, backend=backend, **options)


def minimised(loss: Callable[..., Tensor]) -> Callable[[nn.Module, Any], Tensor]:
    return lambda model, batch: loss(model(batch[0]), batch[1])


def expected(model: nn.Module, support: Any, query: Any, objective: Any = None, **options: Any) -> oracle.Answer:
    options.setdefault("hyper", {"lr": torch.tensor(LR, dtype=torch.float64)})
    options.setdefault("steps", 2)
    return oracle.meta_gradient(model, objective or minimised(F.cross_entropy), support, query, **options)


def close(got: Tensor | None, want: Tensor) -> None:
    got = torch.zeros_like(want) if got is None else got
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def check_grads(model: nn.Module, answer: oracle.Answer) -> None:
    for name, parameter in model.named_parameters():
        close(parameter.grad, answer.params[name])
