"""Every rule to the end: each function of normalise_cases as the loss of a model, native, against the eager loop.

The arrays are parameters, so that the meta-gradient of two steps holds first and second derivatives of every form of
every op, fused, laid out and planned as they come.
"""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from normalise_cases import CASES, Case
from parity import EXACT, assert_same, require
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import metafast

TASKS, LR = 1, 0.03125
TARGETS = ("cross_entropy", "bce", "soft_margin", "hinge_embedding")  # PyTorch differentiates these in one argument
# What PyTorch itself cannot answer.
UNANSWERED = dict.fromkeys(["isnan", "isinf"], "no gradient at all")
UNANSWERED |= dict.fromkeys(["max.nan", "min.nan"], "a loss that is NaN")
_INFINITE = [c.name for c in CASES if c.name.startswith(("hardswish", "smooth_l1", "huber")) and "infinite" in c.name]
UNANSWERED |= dict.fromkeys(_INFINITE, "a loss that is NaN: ∞/∞")
_NAN = ["pow.at_zero", "std.zero", "norm.zero", "logaddexp.inf"]
UNANSWERED |= dict.fromkeys(_NAN, "PyTorch's second derivative is NaN here")
UNANSWERED |= dict.fromkeys(["act.hardsigmoid", "cdist", "cdist.1"], "PyTorch has no second derivative")


class Arrays(nn.Module):
    """A case's real arrays as parameters; the batch is its labels and a number to be near to."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        arrays = [t for t in case.inputs(2).values() if t.is_floating_point()]
        count = 1 if case.name.startswith(TARGETS) else len(arrays)
        self.arrays = nn.ParameterList([nn.Parameter(t) for t in arrays[:count]])
        self.rest = arrays[count:]


def objective(model: Arrays, batch: Any) -> Tensor:
    shift, *labels = batch
    out = model.case.f(*(torch.add(p, shift) for p in model.arrays), *model.rest, *labels).to(shift.dtype)
    weight = torch.arange(1, out.numel() + 1, dtype=out.dtype).cos().reshape(out.shape)
    return (out / (1.0 + out * out) * weight).sum()  # bounded, whatever the function makes of large numbers


def batch_of(case: Case, seed: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    shift = 0.0625 * torch.rand(TASKS, generator=g, dtype=torch.float64)
    labels = [torch.randint(0, classes, (TASKS, *shape), generator=g) for shape, classes in case.labels]
    return (shift, *labels)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_meta_gradient_of_the_rule(case: Case) -> None:
    require("native")
    if case.name in UNANSWERED:
        pytest.skip(UNANSWERED[case.name])
    model, support, query = Arrays(case), batch_of(case, 0), batch_of(case, 1)
    rate = torch.tensor(LR, dtype=torch.float64)
    inner = metafast.InnerLoop(
        model, objective=objective, update=metafast.SGD(lr=nn.Parameter(rate)), steps=2, backend="native"
    )
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch differentiates no other form of attention twice
        expected = oracle.meta_gradient(model, objective, support, query, hyper={"lr": rate}, steps=2)
    inner(support, query).backward()
    assert_same({n: p.grad for n, p in model.named_parameters()}, expected.params, max(EXACT, case.tolerance))
