"""Random models: in-place writes, views, branches and layers in any order, captured and compared with the eager loop.

`Net` draws its forward from a seed, the same at every call, so that no order of operations is one that somebody
thought of. Functions are moved off their kinks and kept small, so that float64 results agree closely.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from parity import BACKENDS, answer, assert_same, inner_loop, metafast_gradients, named, require
from torch import Tensor, nn
from zoo import Task

Step = Callable[["Net", Tensor], Tensor]


def write_columns(net: Net, h: Tensor) -> Tensor:
    made = torch.sin(h).clone()
    made[:, ::2] += 0.3
    return made


def write_through_a_view(net: Net, h: Tensor) -> Tensor:
    made = torch.cos(h).clone()
    view = made[:, 1:3]
    view.mul_(net.scale)
    view.add_(0.2)
    return made


def write_through_a_transpose(net: Net, h: Tensor) -> Tensor:
    made = torch.tanh(h).clone()
    made.t()[0].fill_(0.25)
    return made


def copy_then_write(net: Net, h: Tensor) -> Tensor:
    made = torch.zeros_like(h)
    made.copy_(h.sin())
    made[-1] = h[0] * 0.5
    return made


def halves(net: Net, h: Tensor) -> Tensor:
    left, right = h.chunk(2, 1)
    return left * right.sigmoid()


def convolve(net: Net, h: Tensor) -> Tensor:
    return net.norm2d(net.conv(h.view(len(h), 2, 2, 2))).flatten(1)


def pool(net: Net, h: Tensor) -> Tensor:
    return F.max_pool2d(h.reshape(len(h), 2, 2, 2), 2).squeeze(-1).squeeze(-1)


def repeat(net: Net, h: Tensor) -> Tensor:
    return h.unsqueeze(1).expand(-1, 3, -1).reshape(len(h), -1)[:, :8]


ANY_WIDTH: list[Step] = [
    write_columns,
    write_through_a_view,
    write_through_a_transpose,
    copy_then_write,
    repeat,
    lambda net, h: F.relu(h + 0.1),
    lambda net, h: torch.sin(h).mul_(1.5),
    lambda net, h: torch.cat([h, torch.tanh(h)], 1)[:, ::2],
    lambda net, h: torch.stack([h, h.sin()], 1).mean(1),
    lambda net, h: h.softmax(-1),
    lambda net, h: (h @ h.t()).sin() @ h,
    lambda net, h: h.clamp(-0.713, 0.911),
    lambda net, h: torch.where(h > 0.137, h.sin(), net.scale * h.cos()),
    lambda net, h: F.gelu(h) - F.softplus(h),
    lambda net, h: h - h.mean(0, keepdim=True),
    lambda net, h: h / (h.var(1, unbiased=False, keepdim=True) + 0.5).sqrt(),
    lambda net, h: torch.maximum(h + 0.21, 0.3 * h.detach()),
    lambda net, h: (h.abs() + 0.3).log() * torch.sigmoid(h),
    lambda net, h: F.elu(h.clone(), inplace=True) + F.leaky_relu(h, 0.1),
]
OF_WIDTH: dict[int, list[Step]] = {
    8: [halves, convolve, pool, lambda net, h: net.second(h), lambda net, h: h * net.mask],
    4: [halves, lambda net, h: net.layer_norm(h), lambda net, h: h @ net.w],
}


class Net(nn.Module):
    """Nine steps drawn from a seed; what came last goes to the head."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(12, 3)
        self.conv, self.w = nn.Conv2d(2, 3, 2), nn.Parameter(torch.randn(4, 3))
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.layer_norm, self.norm1d, self.norm2d = nn.LayerNorm(4), nn.BatchNorm1d(8), nn.BatchNorm2d(3)
        self.register_buffer("mask", torch.rand(8).round())

    def forward(self, x: Tensor) -> Tensor:
        rng = random.Random(self.seed)
        values = [self.first(x), self.norm1d(self.first(x)), x]
        for _ in range(9):
            h = values[-1 - min(int(rng.expovariate(0.4)), len(values) - 1)]
            width = h.shape[1]
            values.append(
                rng.choice(ANY_WIDTH + 3 * OF_WIDTH.get(width, []) if width > 2 else [repeat])(self, h)
            )
        wide = [F.pad(v.sin(), (0, 12))[:, :12] for v in values[-3:]]
        return self.head(torch.stack(wide).sum(0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(24))
def test_random_models(seed: int, backend: str) -> None:
    def make() -> Task:
        torch.manual_seed(seed)
        net = Net(seed).double()
        draw = lambda n: (torch.randn(2, n, 6, dtype=torch.float64), torch.randint(0, 3, (2, n)))  # noqa: E731
        return Task(net, draw(6), draw(5), loss=F.cross_entropy)

    task = make()
    inner = inner_loop(task, require(backend), steps=2)
    _, got = metafast_gradients(inner, task, "fused")
    expected = answer(make(), 2, 2)
    assert_same(got, named(expected))
    for name, buffer in task.model.named_buffers():
        torch.testing.assert_close(buffer, expected.buffers[name], rtol=1e-9, atol=1e-12)
