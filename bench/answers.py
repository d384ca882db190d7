"""Is the answer right? Each contender's loss and meta-gradient against an eager loop in float64.

The bound is not a constant: batch normalisation over five images and the kinks of ReLU and max-pooling make
the float32 answer of *any* implementation differ, and by leaps: one maximum that goes the other way moves the
gradient a thousand times further than rounding does. So a contender may be off by `SLACK` times what the plain
PyTorch loop in float32 is off, at worst over the batch and `JITTERS` copies of it with data moved by `NOISE`, or by
`FLOOR`, whichever is more. One that is off by more is asked again on those copies, and the median of its errors
decides: a leap that a rounding of the data undoes is no fault, an error that stays is.
"""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from bench.machine import cache_folder
from bench.peers import Eager, Raw
from bench.workloads import Case

SLACK = 4.0
JITTERS = 4
NOISE = 8 * 2.0**-24  # relative; what rounding leaves on a sum of some hundred float32 products
FLOOR = {torch.float32: 2e-5, torch.float64: 1e-9}


@dataclass(frozen=True)
class Answer:
    """Mean loss over tasks and the whole meta-gradient `(P,)`, in float64."""

    loss: float
    gradient: Tensor


@dataclass(frozen=True)
class Deviation:
    """How far an answer is from the oracle's: loss (relative), gradient (relative L2, cosine)."""

    loss: float
    l2: float
    cosine: float


@dataclass(frozen=True)
class Verdict:
    """A contender's deviation, the bound it is held to, and why it failed (None: it did not)."""

    deviation: Deviation
    bound: float
    fault: str | None


def as_answer(raw: Raw) -> Answer:
    """The numbers of a contender, whatever arrays it returns."""
    loss, gradients = raw
    return Answer(float(loss), torch.cat([_flat(g) for g in gradients]))


def _flat(array: Any) -> Tensor:
    tensor = array.detach() if isinstance(array, Tensor) else torch.from_numpy(np.array(array))
    return tensor.double().reshape(-1)


def deviation(answer: Answer, oracle: Answer) -> Deviation:
    """Distance of an answer from the oracle; a gradient of another length raises."""
    if answer.gradient.shape != oracle.gradient.shape:
        got, expected = len(answer.gradient), len(oracle.gradient)
        raise ValueError(f"meta-gradient: got {got} numbers, expected {expected}, one a parameter")
    norm = oracle.gradient.norm()
    cosine = torch.dot(answer.gradient, oracle.gradient) / (answer.gradient.norm() * norm)
    return Deviation(
        abs(answer.loss - oracle.loss) / max(abs(oracle.loss), 1e-30),
        float((answer.gradient - oracle.gradient).norm() / norm),
        float(cosine),
    )


def judge(answer: Answer, oracle: Answer, reference: Deviation, dtype: torch.dtype) -> Verdict:
    """Hold an answer to `SLACK` times the reference's own error; NaN fails."""
    found = deviation(answer, oracle)
    bound = max(SLACK * reference.l2, FLOOR[dtype])
    loss_bound = max(SLACK * reference.loss, bound)
    fault = None
    if not found.l2 <= bound:
        fault = f"relative L2 of the meta-gradient: got {found.l2:.1e}, expected at most {bound:.1e}"
    elif not found.loss <= loss_bound:
        fault = f"relative error of the loss: got {found.loss:.1e}, expected at most {loss_bound:.1e}"
    return Verdict(found, bound, fault)


def judge_again(
    first: Verdict, ask: Callable[[Case], Raw], case: Case, oracle: Answer, reference: Deviation
) -> Verdict:
    """The verdict of median error among the first and those on the copies of the case."""
    dtype = case.workload.dtype
    more = [judge(as_answer(ask(c)), oracle, reference, dtype) for c in _jittered(case)]
    ranked = sorted([first, *more], key=lambda verdict: (math.isnan(verdict.deviation.l2), verdict.deviation.l2))
    return ranked[len(ranked) // 2]


def oracle_answer(case: Case) -> Answer:
    """Loss and meta-gradient by `functional_call` and `torch.autograd.grad` in float64, task by task."""
    w, module = case.workload, copy.deepcopy(case.module).double()
    params = dict(module.named_parameters())
    adapted = [name for name in params if w.adapts(name)]
    total, mean = torch.zeros(sum(p.numel() for p in params.values()), dtype=torch.float64), 0.0
    for xs, ys, xq, yq in zip(*case.support, *case.query, strict=True):
        fast = dict(params)
        for _ in range(w.steps):
            loss = w.loss(functional_call(module, fast, (xs.double(),)), _target(ys))
            grads = torch.autograd.grad(loss, [fast[n] for n in adapted], create_graph=w.order == 2)
            fast.update({n: fast[n] - w.lr * g for n, g in zip(adapted, grads, strict=True)})
        loss = w.loss(functional_call(module, fast, (xq.double(),)), _target(yq))
        total += torch.cat([_flat(g) for g in torch.autograd.grad(loss, list(params.values()))])
        mean += float(loss.detach())
    return Answer(mean / w.tasks, total / w.tasks)


def _target(y: Tensor) -> Tensor:
    return y.double() if y.is_floating_point() else y


# ---- the oracle is slow on large nets, so its answers are kept


def _jittered(case: Case) -> Iterator[Case]:
    """The same tasks with data moved by what rounding would move them; none where float64 is asked for."""
    generator = torch.Generator().manual_seed(0)

    def moved(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = batch
        return x * (1 + NOISE * (2 * torch.rand(x.shape, generator=generator) - 1)), y

    for _ in range(JITTERS if case.workload.dtype == torch.float32 else 0):
        yield replace(case, support=moved(case.support), query=moved(case.query))


def reference(case: Case) -> tuple[Answer, Deviation]:
    """The oracle's answer, and the worst error of the PyTorch loop in the workload's dtype; kept on disk."""
    file = cache_folder() / f"{case.workload.name}-{case.fingerprint()}-{JITTERS}.pt"
    if file.exists():
        kept = torch.load(file, weights_only=True)
        return Answer(kept["loss"], kept["gradient"]), Deviation(**json.loads(kept["reference"]))
    oracle = oracle_answer(case)
    found = [deviation(as_answer(Eager().prepare(c)()), oracle) for c in (case, *_jittered(case))]
    error = Deviation(max(d.loss for d in found), max(d.l2 for d in found), min(d.cosine for d in found))
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    kept = {"loss": oracle.loss, "gradient": oracle.gradient, "reference": json.dumps(asdict(error))}
    torch.save(kept, part)
    part.replace(file)
    return oracle, error
