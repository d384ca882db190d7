"""`InnerLoop.profile`: every instruction of the call, counted, timed, printed and drawn."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metafast
from metafast.errors import BackendError, InputError, InputTypeError
from metafast.sweep import SECTIONS

TASKS, STEPS = 3, 2


def made(backend: str = "auto") -> tuple[metafast.InnerLoop, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    inner = metafast.InnerLoop(model, F.mse_loss, update=metafast.SGD(lr=0.1), steps=STEPS, backend=backend)
    return inner, (torch.randn(TASKS, 5, 4), torch.randn(TASKS, 5, 2))


def test_every_instruction_is_counted_and_timed() -> None:
    inner, batch = made()
    profile = inner.profile(batch, batch)
    per_call = {"prologue": TASKS, "inner": TASKS * STEPS, "query": TASKS, "meta": TASKS * STEPS, "epilogue": TASKS}
    assert {row.section for row in profile.rows} == set(SECTIONS)
    # The first state is laid out once for all tasks.
    once = [row.section == "prologue" and row.what == "store" for row in profile.rows]
    calls = [1 if first else per_call[row.section] for first, row in zip(once, profile.rows, strict=True)]
    assert sum(once) == 6
    assert [row.calls for row in profile.rows] == calls
    assert all(row.seconds > 0 and row.nbytes > 0 for row in profile.rows)
    products = [row for row in profile.rows if row.kernel == "gemm" and row.section == "query"]
    # forward 5×4×8 and 5×8×2; backward the weights of both and the input of the second
    assert sum(row.flops for row in products) == TASKS * 2 * (2 * 5 * 4 * 8 + 3 * 5 * 8 * 2)
    assert sum(section.seconds for section in profile.sections()) == pytest.approx(profile.seconds)


def test_it_changes_nothing() -> None:
    inner, batch = made()
    before = {name: value.clone() for name, value in inner.state_dict().items()}
    inner.profile(batch, batch, repeats=1)
    assert all(torch.equal(value, before[name]) for name, value in inner.state_dict().items())
    assert all(p.grad is None for p in inner.parameters())


def test_it_prints_a_table_and_draws_a_picture(tmp_path: Path) -> None:
    inner, batch = made()
    profile = inner.profile(batch, batch, repeats=1)
    text = str(profile)
    assert text.count("\n") > len(profile.rows)
    assert all(word in text for word in (*SECTIONS, "gemm", "GFLOP/s", "3 tasks, 2 steps"))
    profile.save(tmp_path / "profile.png")
    assert (tmp_path / "profile.png").read_bytes()[:4] == b"\x89PNG"


def test_a_fallback_has_no_profile() -> None:
    inner, batch = made("torch")
    with pytest.raises(BackendError, match=r"torch\.profiler"):
        inner.profile(batch, batch)


def test_no_repeats_is_an_error() -> None:
    inner, batch = made()
    with pytest.raises(InputError, match="1 or more"):
        inner.profile(batch, batch, repeats=0)
    for wrong in ("a", 1.5, True):
        with pytest.raises(InputTypeError, match=rf"repeats=...\): got {wrong!r}, expected an int; leave it at 5"):
            inner.profile(batch, batch, repeats=wrong)  # type: ignore[arg-type]
