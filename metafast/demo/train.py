"""Meta-training, testing, and the race against plain PyTorch.

MAML (Finn et al., arXiv:1703.03400): the usual four-block conv net, BatchNorm with the statistics of the batch at hand,
gradient descent as inner update, Adam with a cosine schedule outside.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metafast

from . import eager
from .console import Stop, Stopwatch, Track
from .glyphs import SIZE, TEST_ALPHABETS, TRAIN_ALPHABETS, Glyphs, TaskSampler
from .settings import Settings

TEST_SEED = 0x7E57  # test tasks are the same for every run, so that runs can be compared
TEST_CHUNK = 50  # tasks tested in one call
PROBES = 100  # points of the training curve
RACE_STEPS = 3


@dataclass
class Training:
    """A net after meta-training, and how it went: loss of each step, its seconds, accuracy at some of them."""

    net: nn.Module
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    probes: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Accuracy:
    """Mean over tasks and half the width of its 95 % interval (normal approximation over tasks), as fractions."""

    mean: float
    interval: float
    tasks: int

    def __str__(self) -> str:
        return f"{100 * self.mean:5.1f} ± {100 * self.interval:.1f} %"

    @classmethod
    def of(cls, hits: Tensor) -> Accuracy:
        """From the accuracy of each task: (tasks,)."""
        interval = 1.96 * float(hits.std()) / math.sqrt(len(hits)) if len(hits) > 1 else math.nan
        return cls(float(hits.mean()), interval, len(hits))


@dataclass(frozen=True)
class Race:
    """The same training step twice: seconds (median of three) by metafast and by the plain loop, and their losses."""

    metafast_seconds: float
    eager_seconds: float
    metafast_loss: float
    eager_loss: float

    @property
    def ratio(self) -> float:
        """How many times faster metafast was."""
        return self.eager_seconds / self.metafast_seconds


@dataclass(frozen=True)
class Example:
    """One test task for the picture.

    **Fields**: `letters` (ways,); `support` (ways, shots, 28, 28) and `query` (ways, queries, 28, 28) images, ink 1;
    `before` and `after` (ways, queries) bool, which queries the net gets right as it is and once adapted.
    """

    letters: list[str]
    support: Tensor
    query: Tensor
    before: Tensor
    after: Tensor


def make_net(settings: Settings) -> nn.Module:
    """Conv4 with seeded weights: four blocks of conv 3×3, BatchNorm, ReLU, max-pool, then a linear layer.

    BatchNorm keeps no running statistics: it always reads those of the batch, as in MAML. The global random state is
    left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        layers: list[nn.Module] = []
        channels = 1
        for _ in range(4):
            layers += [
                nn.Conv2d(channels, settings.filters, 3, padding=1),
                nn.BatchNorm2d(settings.filters, track_running_stats=False),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
            channels = settings.filters
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(settings.filters, settings.ways))


def make_inner(
    net: nn.Module, settings: Settings, backend: str, *, steps: int | None = None, outputs: bool = False
) -> metafast.InnerLoop:
    """The inner loop over `net`, with as many steps as in training unless told otherwise."""
    return metafast.InnerLoop(
        net,
        F.cross_entropy,
        update=metafast.SGD(lr=settings.inner_lr),
        steps=settings.inner_steps if steps is None else steps,
        order=settings.order,
        backend=backend,
        return_outputs=outputs,
    )


def make_sampler(glyphs: Glyphs, settings: Settings, alphabets: Sequence[str], seed: int) -> TaskSampler:
    """Tasks as the settings want them, from letters of `alphabets`."""
    return TaskSampler(glyphs, alphabets, settings.ways, settings.shots, settings.queries, seed)


def check_room(glyphs: Glyphs, settings: Settings) -> None:
    """**Raises** ValueError when the letters cannot fill tasks as the settings want them."""
    for alphabets in (TRAIN_ALPHABETS, TEST_ALPHABETS):
        make_sampler(glyphs, settings, alphabets, 0)


def make_optimizer(net: nn.Module, settings: Settings) -> tuple[torch.optim.Optimizer, Any]:
    """Adam and its schedule: a cosine from `outer_lr` to a twentieth of it."""
    optimizer = torch.optim.Adam(net.parameters(), lr=settings.outer_lr)
    low = settings.outer_lr / 20
    return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.steps, eta_min=low)


def hits(inner: metafast.InnerLoop, support: eager.Batch, query: eager.Batch) -> Tensor:
    """Share of the query that each task gets right after adaptation: (tasks,) float32."""
    with torch.no_grad():
        _, logits = inner(support, query)
    right: Tensor = logits.argmax(-1) == query[1]
    return right.float().mean(-1)


def train(settings: Settings, glyphs: Glyphs, backend: str, at: Track, stop: Stop) -> Training:
    """Meta-train from the seed: the same weights and the same tasks, whatever the backend."""
    net = make_net(settings)
    inner = make_inner(net, settings, backend)
    probe = make_inner(net, settings, backend, outputs=True)
    optimizer, schedule = make_optimizer(net, settings)
    sampler = make_sampler(glyphs, settings, TRAIN_ALPHABETS, settings.seed)
    training = Training(net)
    every = max(1, settings.steps // PROBES)
    for step in range(settings.steps):
        support, query = sampler.sample(settings.tasks)
        if step % every == 0:
            training.probes.append((step, float(hits(probe, support, query).mean())))
        watch = Stopwatch()
        optimizer.zero_grad()
        loss = inner(support, query)
        loss.backward()
        optimizer.step()
        schedule.step()
        training.seconds.append(watch.seconds)
        training.losses.append(float(loss.detach()))
        at(step + 1, settings.steps, describe(training, every))
        if stop.wanted:
            break
    return training


def describe(training: Training, every: int) -> str:
    """Running loss and accuracy of the latest steps."""
    recent = training.losses[-20:]
    accuracy = [share for _, share in training.probes[-max(1, 20 // every) :]]
    return f"loss {statistics.fmean(recent):.3f}  accuracy {100 * statistics.fmean(accuracy):4.1f} %"


def test(
    net: nn.Module, settings: Settings, glyphs: Glyphs, backend: str, steps: Sequence[int], at: Track, stop: Stop
) -> list[Accuracy]:
    """Accuracy on the test alphabets after each number of inner steps in `steps`; the tasks are the same for all."""
    inners = [make_inner(net, settings, backend, steps=count, outputs=True) for count in steps]
    sampler = make_sampler(glyphs, settings, TEST_ALPHABETS, TEST_SEED)
    parts: list[list[Tensor]] = [[] for _ in steps]
    shown, unit = parts[steps.index(settings.inner_steps)], "step" if settings.inner_steps == 1 else "steps"
    done = 0
    while done < settings.test_tasks and not (done and stop.wanted):
        count = min(TEST_CHUNK, settings.test_tasks - done)
        support, query = sampler.sample(count)
        for part, inner in zip(parts, inners, strict=True):
            part.append(hits(inner, support, query))
        done += count
        accuracy = f"{100 * float(torch.cat(shown).mean()):4.1f} %"
        at(done, settings.test_tasks, f"accuracy after {settings.inner_steps} inner {unit} {accuracy}")
    return [Accuracy.of(torch.cat(part)) for part in parts]


def make_example(net: nn.Module, settings: Settings, glyphs: Glyphs, backend: str) -> Example:
    """The first test task, and what the net makes of it."""
    sampler = make_sampler(glyphs, settings, TEST_ALPHABETS, TEST_SEED)
    letters = sampler.letters(1)[0]
    support, query = sampler.sample(1)
    right = []
    for steps in (0, settings.inner_steps):
        with torch.no_grad():
            _, logits = make_inner(net, settings, backend, steps=steps, outputs=True)(support, query)
        right.append((logits.argmax(-1) == query[1]).view(settings.ways, settings.queries))
    pictures = [x.view(settings.ways, -1, SIZE, SIZE) for x, _ in (support, query)]
    return Example(letters, *pictures, *right)


def race(net: nn.Module, settings: Settings, glyphs: Glyphs, backend: str, at: Track) -> Race:
    """Time the same training step by metafast and by the plain loop, in turn, after one step of each to warm up.

    Both start from the same weights; the losses returned are those of the first step, where they must agree.
    """
    ours, theirs = copy.deepcopy(net), copy.deepcopy(net)
    inner = make_inner(ours, settings, backend)
    our_optimizer, their_optimizer = make_optimizer(ours, settings)[0], make_optimizer(theirs, settings)[0]
    sampler = make_sampler(glyphs, settings, TRAIN_ALPHABETS, settings.seed)
    seconds: tuple[list[float], list[float]] = ([], [])
    losses: list[tuple[float, float]] = []
    for step in range(RACE_STEPS + 1):
        support, query = sampler.sample(settings.tasks)
        watch = Stopwatch()
        our_optimizer.zero_grad()
        our_loss = inner(support, query)
        our_loss.backward()
        our_optimizer.step()
        seconds[0].append(watch.seconds)
        watch = Stopwatch()
        their_loss = eager.meta_step(
            theirs, their_optimizer, support, query,
            inner_lr=settings.inner_lr, steps=settings.inner_steps, order=settings.order,
        )  # fmt: skip
        seconds[1].append(watch.seconds)
        losses.append((float(our_loss.detach()), their_loss))
        at(step, RACE_STEPS)
    return Race(statistics.median(seconds[0][1:]), statistics.median(seconds[1][1:]), *losses[0])
