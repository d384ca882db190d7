"""Small models and tasks, one for every kind of layer, loss and batch that the native pipeline claims.

Every entry is made from a fixed seed in float64. `make(dtype)` casts what it made; `make(rounded=True)` gives
the numbers that float32 holds, in float64: what float32 results are measured against.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

TASKS, WAYS, SHOTS, QUERIES = 3, 3, 2, 2
LR = 0.125  # a number that float32 holds
Cast = Callable[[Tensor], Tensor]


@dataclass
class Task:
    """What one test needs: a model, what is minimised, the batches, and tensors the loss finds on its own."""

    model: nn.Module
    support: Any
    query: Any
    loss: Callable[..., Tensor] | None = None  # loss(model(x), y), or
    objective: Callable[..., Tensor] | None = None  # objective(model, batch)
    params: Any = None
    externs: list[Tensor] = field(default_factory=list)

    def minimised(self) -> Callable[[nn.Module, Any], Tensor]:
        """The loss as an objective of model and batch, either way it was given."""
        if self.objective is not None:
            return self.objective
        loss = self.loss
        assert loss is not None
        return lambda model, batch: loss(model(batch[0]), batch[1])

    def adapted(self) -> list[str]:
        """Names of the parameters that adapt: all, or those under the prefix that `params` gives."""
        names = [name for name, _ in self.model.named_parameters()]
        return names if self.params is None else [n for n in names if n.startswith(self.params.rstrip("*"))]


@dataclass(frozen=True, eq=False)
class Entry:
    """A name and a function that makes its task, given a cast for tensors of its own."""

    name: str
    build: Callable[[Cast], Task]
    smooth: bool = False  # no kink: finite differences are exact to their own error

    def __str__(self) -> str:
        return self.name

    def make(self, dtype: torch.dtype = torch.float64, *, rounded: bool = False) -> Task:
        """The task in `dtype`, always the same numbers."""

        def cast(t: Tensor) -> Tensor:
            return (t.float() if rounded else t).to(dtype) if t.is_floating_point() else t

        state = torch.random.get_rng_state()
        try:
            torch.manual_seed(zlib.crc32(self.name.encode()))
            task = self.build(cast)
        finally:
            torch.random.set_rng_state(state)
        for tensor in [*task.model.parameters(), *task.model.buffers()]:
            tensor.data = cast(tensor.data)
        task.support, task.query = pytree.tree_map(cast, (task.support, task.query))
        return task


# ---- data --------------------------------------------------------------------------------------------


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def labels(shots: int) -> Tensor:
    return torch.arange(WAYS).repeat_interleave(shots).repeat(TASKS, 1)


def classification(*features: int) -> dict[str, Any]:
    """Support and query of (x, y), classes apart by their mean."""
    centre = normal(TASKS, WAYS, *features)

    def batch(shots: int) -> tuple[Tensor, Tensor]:
        x = centre.repeat_interleave(shots, 1)
        return x + 0.5 * torch.randn_like(x), labels(shots)

    return {"support": batch(SHOTS), "query": batch(QUERIES)}


def regression(inputs: int = 1, outputs: int = 1, shots: int = 5) -> dict[str, Any]:
    def batch(n: int) -> tuple[Tensor, Tensor]:
        x = normal(TASKS, n, inputs)
        phase = torch.arange(TASKS, dtype=torch.float64)[:, None, None]
        return x, torch.sin(2 * x.sum(-1, keepdim=True) + phase).expand(-1, -1, outputs) + 0.1 * normal(
            1, 1, outputs
        )

    return {"support": batch(shots), "query": batch(shots + 2)}


def mlp(*widths: int, act: Callable[[], nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), act()]
    return nn.Sequential(*layers[:-1])


ENTRIES: list[Entry] = []


def entry(*, smooth: bool = False) -> Callable[[Callable[[Cast], Task]], Callable[[Cast], Task]]:
    def add(build: Callable[[Cast], Task]) -> Callable[[Cast], Task]:
        ENTRIES.append(Entry(build.__name__, build, smooth))
        return build

    return add


# ---- multilayer perceptrons --------------------------------------------------------------------------


@entry()
def mlp_relu(cast: Cast) -> Task:
    return Task(mlp(7, 9, 8, WAYS), **classification(7), loss=F.cross_entropy)


@entry(smooth=True)
def mlp_tanh_sigmoid(cast: Cast) -> Task:
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 9), nn.Sigmoid(), nn.Linear(9, WAYS))
    return Task(model, **classification(7), loss=F.cross_entropy)


@entry(smooth=True)
def mlp_gelu(cast: Cast) -> Task:
    model = nn.Sequential(
        nn.Linear(7, 9), nn.GELU(), nn.Linear(9, 9), nn.GELU(approximate="tanh"), nn.Linear(9, WAYS)
    )
    return Task(model, **classification(7), loss=F.cross_entropy)


@entry(smooth=True)
def mlp_silu_softplus(cast: Cast) -> Task:
    model = nn.Sequential(
        nn.Linear(7, 9), nn.SiLU(), nn.Linear(9, 9), nn.Softplus(beta=2.0), nn.Linear(9, WAYS)
    )
    return Task(model, **classification(7), loss=F.cross_entropy)


@entry()
def mlp_elu_leaky(cast: Cast) -> Task:
    model = nn.Sequential(
        nn.Linear(7, 9), nn.ELU(0.7), nn.Linear(9, 9, bias=False), nn.LeakyReLU(0.1), nn.Linear(9, WAYS)
    )
    return Task(model, **classification(7), loss=F.cross_entropy)


@entry(smooth=True)
def mlp_layer_norm(cast: Cast) -> Task:
    model = nn.Sequential(nn.Linear(7, 10), nn.LayerNorm(10), nn.Tanh(), nn.Linear(10, WAYS))
    nn.init.normal_(model[1].weight)
    return Task(model, **classification(7), loss=F.cross_entropy)


@entry()
def in_place(cast: Cast) -> Task:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last, self.act = nn.Linear(7, 9), nn.Linear(9, WAYS), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            h = self.act(self.first(x))
            h = h.clone()
            h += 0.5
            h[:, 2:4].mul_(2.0)
            h[:, 0] = torch.sigmoid(h[:, 5])
            return self.last(F.silu(h, inplace=True))

    return Task(Net(), **classification(7), loss=F.cross_entropy)


@entry()
def skip_connections(cast: Cast) -> Task:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(7, 8), nn.Linear(11, 8), nn.Linear(16, WAYS)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x))
            g = self.b(torch.cat([h[:, ::2], x], 1)).relu()
            g = g + h
            left, right = g.chunk(2, 1)
            return self.c(torch.cat([right, left, torch.stack([h[:, 3], h[:, 1]], 1), h[:, 1:7]], -1))

    return Task(Net(), **classification(7), loss=F.cross_entropy)


@entry()
def tied_weights(cast: Cast) -> Task:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = (
                nn.Linear(7, 7),
                nn.Linear(7, 7),
                nn.Linear(7, WAYS, bias=False),
            )
            self.second.weight = self.first.weight

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.second(torch.tanh(self.first(x))))
            return self.head(F.linear(h, self.first.weight.t()))

    return Task(Tied(), **classification(7), loss=F.cross_entropy)


@entry(smooth=True)
def attention(cast: Cast) -> Task:
    """Self-attention over five tokens of four features, by matmul and softmax, then a mean over tokens."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, WAYS)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).split(4, dim=-1)
            scores = q @ k.transpose(-1, -2) / 2.0
            return self.out((scores.softmax(-1) @ v + x).mean(1))

    return Task(Net(), **classification(5, 4), loss=F.cross_entropy)


@entry(smooth=True)
def ensemble(cast: Cast) -> Task:
    """Four members as one batched product; their log-probabilities are averaged."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1, self.b1 = nn.Parameter(0.5 * normal(4, 7, 6)), nn.Parameter(normal(4, 1, 6))
            self.w2 = nn.Parameter(0.5 * normal(4, 6, WAYS))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(torch.bmm(x.expand(4, -1, -1), self.w1) + self.b1)
            return torch.bmm(h, self.w2).log_softmax(-1).mean(0)

    return Task(Net(), **classification(7), loss=F.nll_loss)


@entry(smooth=True)
def closure_constants(cast: Cast) -> Task:
    """A fixed table and a learned scale that the loss finds in its closure."""
    table = cast(normal(WAYS, 5))
    scale = cast(torch.tensor(0.7, dtype=torch.float64)).requires_grad_()

    def loss(embedded: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(scale * embedded @ table.T, y)

    return Task(mlp(7, 8, 5, act=nn.Tanh), **classification(7), loss=loss, externs=[scale])


@entry()
def pointwise(cast: Cast) -> Task:
    """Functions of one and two arguments, reductions, clamping and selection."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(7, 8), nn.Linear(8, WAYS)
            self.scale = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            h = torch.where(h > 0.2, h.abs().sqrt(), (h * 0.5).exp() - 1.0)
            h = h.clamp(-0.8, 1.5) + torch.log(h * h + 1.0) / self.scale + h.pow(3) * 0.1
            h = torch.maximum(h, -h.mean(0, keepdim=True)) - h.var(1, keepdim=True, unbiased=False)
            return self.b(h / (1.0 + h.square().sum(1, keepdim=True)).sqrt()) - h.var(1, keepdim=True)

    return Task(Net(), **classification(7), loss=F.cross_entropy)


# ---- losses ------------------------------------------------------------------------------------------


@entry()
def sinusoid(cast: Cast) -> Task:
    return Task(mlp(1, 10, 10, 1), **regression(), loss=F.mse_loss)


@entry()
def huber(cast: Cast) -> Task:
    return Task(
        mlp(2, 8, 3, act=nn.Tanh), **regression(2, 3), loss=lambda p, y: F.huber_loss(p, y, delta=0.4)
    )


@entry()
def l1_and_smooth_l1(cast: Cast) -> Task:
    def loss(p: Tensor, y: Tensor) -> Tensor:
        return F.l1_loss(p, y) + F.smooth_l1_loss(p, y, beta=0.5, reduction="sum")

    return Task(mlp(2, 8, 3, act=nn.Tanh), **regression(2, 3), loss=loss)


@entry(smooth=True)
def binary(cast: Cast) -> Task:
    weight = cast(torch.tensor([0.5, 2.0], dtype=torch.float64))

    def loss(p: Tensor, y: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(p, torch.sigmoid(y), pos_weight=weight)

    return Task(mlp(2, 8, 2, act=nn.Tanh), **regression(2, 2), loss=loss)


@entry(smooth=True)
def weighted_cross_entropy(cast: Cast) -> Task:
    """Class weights, label smoothing and ignored labels at once."""
    weight = cast(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))
    data = classification(7)
    data["support"][1][0, 1] = -1

    def loss(p: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(p, y, weight, ignore_index=-1, label_smoothing=0.1)

    return Task(mlp(7, 8, WAYS, act=nn.Tanh), **data, loss=loss)


@entry(smooth=True)
def soft_targets(cast: Cast) -> Task:
    """Class probabilities as targets, in a batch that is a dict within a dict, a weight for each."""

    def batch(n: int) -> dict[str, Any]:
        target = normal(TASKS, n, WAYS).softmax(-1)
        return {"input": normal(TASKS, n, 7), "meta": {"target": target, "weight": normal(TASKS, n).abs()}}

    def objective(model: nn.Module, b: dict[str, Any]) -> Tensor:
        each = F.cross_entropy(model(b["input"]), b["meta"]["target"], reduction="none")
        return (each * b["meta"]["weight"]).sum() + 1e-2 * sum(p.square().sum() for p in model.parameters())

    return Task(mlp(7, 8, WAYS, act=nn.Tanh), batch(5), batch(4), objective=objective)


# ---- convolutional nets ------------------------------------------------------------------------------


def block(inputs: int, outputs: int, pool: bool = True) -> list[nn.Module]:
    made = [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return [*made, nn.MaxPool2d(2)] if pool else made


def conv4(channels: int = 5) -> nn.Sequential:
    layers = (
        block(1, channels) + block(channels, channels) + block(channels, channels) + block(channels, channels)
    )
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels, WAYS))


def settle(model: nn.Module) -> nn.Module:
    """Give BatchNorm weights and running statistics that are not their defaults."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0.0, 0.3)
            m.running_mean = 0.1 * torch.randn(m.num_features)
            m.running_var = torch.rand(m.num_features) + 0.5
    return model


@entry()
def conv4_max_pool(cast: Cast) -> Task:
    return Task(settle(conv4()), **classification(1, 16, 16), loss=F.cross_entropy)


@entry()
def conv4_eval(cast: Cast) -> Task:
    return Task(settle(conv4()).eval(), **classification(1, 16, 16), loss=F.cross_entropy)


@entry(smooth=True)
def wide_conv(cast: Cast) -> Task:
    """Wide enough for Winograd's form in float32, of all three convolutions; sides of 7 have tiles of 4 and of 3."""
    convs = [nn.Conv2d(16, 16, 3, padding=1), nn.Tanh(), nn.Conv2d(16, 16, 3, padding=1), nn.Tanh()]
    model = nn.Sequential(*convs, nn.AvgPool2d(7), nn.Flatten(), nn.Linear(16, WAYS))
    return Task(model, **classification(16, 7, 7), loss=F.cross_entropy)


@entry(smooth=True)
def wide_linear(cast: Cast) -> Task:
    """A parameter so large that to first order its adjoint goes straight to its sum, and small ones beside it."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2 * 16 * 16, 136), nn.Tanh(), nn.Linear(136, WAYS))
    return Task(model, **classification(2, 16, 16), loss=F.cross_entropy)


@entry(smooth=True)
def large_images(cast: Cast) -> Task:
    """So large that sums over them are made part by part."""
    convs = [nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8, track_running_stats=False), nn.Tanh()]
    model = nn.Sequential(*convs, nn.AvgPool2d(8), nn.Flatten(), nn.Linear(8 * 16, WAYS))
    return Task(model, **classification(2, 32, 32), loss=F.cross_entropy)


@entry()
def strided_conv(cast: Cast) -> Task:
    model = nn.Sequential(
        nn.Conv2d(2, 6, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(6, 7, (3, 2), stride=(2, 1), bias=False),
        nn.BatchNorm2d(7, track_running_stats=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(7 * 2 * 4, WAYS),
    )
    return Task(model, **classification(2, 10, 9), loss=F.cross_entropy)


@entry()
def conv_group_norm(cast: Cast) -> Task:
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.GroupNorm(3, 6),
        nn.SiLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 4, 1),
        nn.InstanceNorm2d(4, affine=True),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(36, WAYS),
    )
    nn.init.normal_(model[1].weight)
    return Task(model, **classification(1, 8, 8), loss=F.cross_entropy)


@entry()
def residual(cast: Cast) -> Task:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(*block(1, 4, pool=False))
            self.body = nn.Sequential(
                *block(4, 4, pool=False), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
            )
            self.short, self.head = nn.Conv2d(4, 4, 1), nn.Linear(16, WAYS)

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            h = F.relu(self.body(h) + self.short(h))
            return self.head(
                F.avg_pool2d(h, 3, stride=3, padding=1, ceil_mode=False)[:, :, :2, :2].flatten(1)
            )

    return Task(settle(Net()), **classification(1, 6, 6), loss=F.cross_entropy)


@entry()
def adaptive_pool(cast: Cast) -> Task:
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.GELU(),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.Conv2d(6, 8, 3),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, WAYS),
    )
    return Task(model, **classification(1, 8, 8), loss=F.cross_entropy)


@entry()
def anil(cast: Cast) -> Task:
    """Only the head adapts: the gradient of the body, shared by all tasks, has the mixed term."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*block(1, 4), *block(4, 4), nn.Flatten())
            self.head = nn.Linear(16, WAYS)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x))

    return Task(settle(Net()), **classification(1, 8, 8), loss=F.cross_entropy, params="head.*")


def named(name: str) -> Entry:
    """The entry of that name."""
    return next(e for e in ENTRIES if e.name == name)
