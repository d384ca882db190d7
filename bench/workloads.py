"""The workloads: one row each, and the batch of tasks a row stands for.

`WORKLOADS` holds the rows by name. A row says all that a contender has to know.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.architectures import Layer, as_module, conv4, mlp

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Goal:
    """What to reach, as (must, aim): ratios to the fastest peer of a kind, percent of the sgemm roof."""

    pytorch: tuple[float, float] | None = None
    eager: tuple[float, float] | None = None
    jax: tuple[float, float] | None = None
    roof: tuple[float, float] | None = None


@dataclass(frozen=True)
class Workload:
    """One meta-gradient: what is adapted, on how many tasks of how many rows, for how many steps.

    `classes` is 0 for regression. `support` and `query` are rows a task. `adapted` is a pattern of
    parameter names: all (`*`) or a prefix (`head.*`). `chunk` is how many tasks torch.func maps at once
    (None: all), set where all at once need more memory than a laptop has.
    """

    name: str
    title: str
    layers: tuple[Layer, ...]
    features: tuple[int, ...]
    classes: int
    tasks: int
    support: int
    query: int
    steps: int
    lr: float
    order: int = 2
    dtype: torch.dtype = torch.float32
    adapted: str = "*"
    chunk: int | None = None
    goal: Goal = field(default_factory=Goal)

    @property
    def loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Cross-entropy for classes, mean squared error for regression; mean over rows."""
        return F.cross_entropy if self.classes else F.mse_loss

    def parts(self) -> tuple[tuple[Layer, ...], tuple[Layer, ...]]:
        """The layers before the first that adapts, whose features are computed once, and the rest."""
        adapting = [layer.fan_in > 0 and self.adapts(f"{layer.name}.") for layer in self.layers]
        first = adapting.index(True)
        return self.layers[:first], self.layers[first:]

    def adapts(self, parameter: str) -> bool:
        """Whether the parameter of that name adapts in the inner loop."""
        return self.adapted == "*" or parameter.startswith(self.adapted.removesuffix("*"))


@dataclass(frozen=True)
class Case:
    """A workload with its numbers: the module, and support and query batches `(T, rows, ...)`."""

    workload: Workload
    module: nn.Module
    support: Batch
    query: Batch

    @property
    def params(self) -> dict[str, Tensor]:
        """Name to parameter, in the module's order: the order of every flattened meta-gradient here."""
        return dict(self.module.named_parameters())

    def fingerprint(self) -> str:
        """Hash of everything the answer depends on; names a cached oracle answer."""
        w = self.workload
        digest = hashlib.sha256(repr((w.layers, w.classes, w.steps, w.lr, w.order, w.adapted)).encode())
        for tensor in (*self.params.values(), *self.support, *self.query):
            digest.update(tensor.detach().numpy().tobytes())
        return digest.hexdigest()[:16]


def _classification(w: Workload, rows: int, prototypes: Tensor, generator: torch.Generator) -> Batch:
    """Noisy copies of each task's class prototypes `(T, classes, *features)`, classes balanced."""
    labels = torch.arange(rows).remainder(w.classes).expand(w.tasks, rows).contiguous()
    noise = torch.randn(w.tasks, rows, *w.features, generator=generator)
    x = prototypes[torch.arange(w.tasks)[:, None], labels] + 0.5 * noise
    return x.to(w.dtype), labels


def _regression(w: Workload, rows: int, waves: Tensor, generator: torch.Generator) -> Batch:
    """Sinusoids of each task's own amplitude and phase, along the mean of the features (Finn et al. 2017)."""
    x = 10 * torch.rand(w.tasks, rows, *w.features, generator=generator) - 5
    amplitude, phase = 0.1 + 4.9 * waves[:, :1], math.pi * waves[:, 1:]
    y = amplitude * torch.sin(x.mean(-1) * math.sqrt(w.features[0]) - phase)
    return x.to(w.dtype), y[..., None].to(w.dtype)


def make_case(w: Workload, seed: int = 0) -> Case:
    """The workload's module and tasks, the same for the same seed; torch's generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = as_module(w.layers).to(w.dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    make = _classification if w.classes else _regression
    shape = (w.classes, *w.features) if w.classes else (2,)
    sample = torch.randn if w.classes else torch.rand
    hidden = sample(w.tasks, *shape, generator=generator)
    support = make(w, w.support, hidden, generator)
    return Case(w, module, support, make(w, w.query, hidden, generator))


SINUSOID = mlp(1, 40, 40, 1)
FC = (784, 256, 128, 64, 64, 5)


def _sinusoid(name: str, tasks: int, steps: int, goal: Goal) -> Workload:
    """The regression of Finn et al. 2017, 10 shots and 10 query points."""
    counted = "one task" if tasks == 1 else f"{tasks} tasks"
    title = f"sinusoid 1-40-40-1, {counted}, 10 shots, K={steps}"
    return Workload(name, title, SINUSOID, (1,), 0, tasks, 10, 10, steps, 0.01, goal=goal)


def _omniglot_fc(name: str, norm: bool, goal: Goal) -> Workload:
    """The fully connected Omniglot net of Finn et al. 2017, 5 ways, 1 shot, 15 query images a class."""
    title = f"Omniglot FC {'-'.join(map(str, FC))}{' with BN' if norm else ''}, 32 tasks, 5w1s, 75 query, K=1"
    return Workload(name, title, mlp(*FC, norm=norm), (784,), 5, 32, 5, 75, 1, 0.4, goal=goal)


def _omniglot(name: str, tasks: int, goal: Goal, chunk: int | None = None) -> Workload:
    """conv4-64 on 28×28 images, 5 ways, 1 shot, 15 query images a class."""
    counted = "one task" if tasks == 1 else f"{tasks} tasks"
    title = f"Omniglot conv4-64 max-pool, {counted}, 5w1s, 75 query, K=1"
    shape = (1, 28, 28)
    net = conv4(1, 28, 64, 5)
    return Workload(name, title, net, shape, 5, tasks, 5, 75, 1, 0.4, chunk=chunk, goal=goal)


def _omniglot_20_ways() -> Workload:
    """conv4-64 on 20 ways, 5 shots, 15 query images a class."""
    title = "Omniglot conv4-64 max-pool, 16 tasks, 20w5s, 300 query, K=5"
    net, goal = conv4(1, 28, 64, 20), Goal((3.5, 5), roof=(85, 120))
    row = Workload("omniglot-20w5s", title, net, (1, 28, 28), 20, 16, 100, 300, 5, 0.1, goal=goal)
    return replace(row, chunk=2)


def _mini_imagenet(name: str, adapted: str, goal: Goal) -> Workload:
    """conv4-32 on 84×84 images, 5 ways, 1 shot, 15 query images a class."""
    what = "miniImageNet" if adapted == "*" else "ANIL head, miniImageNet"
    title = f"{what} conv4-32 84², 4 tasks, 5w1s, 75 query, K=5"
    net = conv4(3, 84, 32, 5)
    return Workload(name, title, net, (3, 84, 84), 5, 4, 5, 75, 5, 0.01, adapted=adapted, goal=goal)


def _mlp(name: str, tasks: int, goal: Goal) -> Workload:
    """The smallest net that anyone times."""
    counted = "one task" if tasks == 1 else f"{tasks} tasks"
    title = f"MLP 10-100-1, {counted}, 10 shots, K=1"
    return Workload(name, title, mlp(10, 100, 1), (10,), 0, tasks, 10, 10, 1, 0.01, goal=goal)


_FC_GOAL = Goal((3, 4), (4, 4), (1.8, 2.5), (70, 90))

_FULL = [
    _mlp("mlp", 32, Goal((3, 5), (150, 150), (2.5, 4))),
    _sinusoid("sinusoid", 25, 5, Goal((4, 6), (200, 200), (3, 5), (40, 60))),
    _sinusoid("sinusoid-1000", 1000, 10, Goal((5, 8), (200, 200), (4, 6), (50, 75))),
    _omniglot_fc("omniglot-fc", False, _FC_GOAL),
    _omniglot_fc("omniglot-fc-bn", True, _FC_GOAL),
    _omniglot("omniglot", 32, Goal((3.5, 5), roof=(85, 120)), chunk=16),
    _omniglot_20_ways(),
    _mini_imagenet("miniimagenet", "*", Goal((3, 5), roof=(75, 110))),
    _mini_imagenet("anil", "head.*", Goal((3, 5))),
    _mlp("one-mlp", 1, Goal((2.5, 4))),
    _sinusoid("one-sinusoid", 1, 5, Goal((2.5, 4))),
    _omniglot("one-omniglot", 1, Goal((2.5, 4))),
]

_TINY = [
    Workload("tiny-mlp", "MLP 3-8-1, 4 tasks, 5 shots, K=2", mlp(3, 8, 1), (3,), 0, 4, 5, 5, 2, 0.05),
    Workload("tiny-conv", "conv4-4 16², 2 tasks, K=2", conv4(1, 16, 4, 3), (1, 16, 16), 3, 2, 3, 6, 2, 0.1),
]


def first_order(w: Workload) -> Workload:
    """The same row as FOMAML."""
    return replace(w, name=f"{w.name}-fo", title=f"FOMAML: {w.title}", order=1, goal=Goal((3, 5)))


_FOMAML = [first_order(w) for w in _FULL if not w.name.startswith("one-")]
WORKLOADS: dict[str, Workload] = {w.name: w for w in (*_FULL, *_FOMAML, *_TINY)}
BY_NAME_ONLY = ("omniglot-fc-bn", "omniglot-fc-bn-fo", "tiny-mlp", "tiny-conv")  # the rest is the table
DEFAULT = tuple(name for name in WORKLOADS if name not in BY_NAME_ONLY)
QUICK = tuple(w.name for w in _TINY)
