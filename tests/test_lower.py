"""Lowering's parts: views as strides, and a plan in which live buffers never overlap."""

from __future__ import annotations

import random

import pytest
import torch

from metafast.lower.arrays import Array, Buffer, Instruction, collapse, memory_order, reshaped
from metafast.lower.memory import lifetimes, place


def array_of(t: torch.Tensor) -> Array:
    return Array(Buffer(0), tuple(t.shape), t.stride(), 4, int(t.storage_offset()))


@pytest.mark.parametrize("seed", range(40))
def test_reshape_views_like_torch(seed: int) -> None:
    """`reshaped` gives torch's strides where torch can view, and None where it cannot."""
    rng = random.Random(seed)
    shape = [rng.choice([1, 2, 3, 4]) for _ in range(rng.randint(1, 4))]
    t = torch.arange(float(torch.tensor(shape).prod())).reshape(shape)
    t = t.permute(rng.sample(range(len(shape)), len(shape)))
    if rng.random() < 0.4:
        t = t[..., : max(1, t.shape[-1] - 1)]
    flat = [t.numel()]
    for target in (flat, [1, *t.shape], [*t.shape, 1], [t.shape[0], t.numel() // t.shape[0]]):
        got = reshaped(array_of(t), tuple(target))
        try:
            want = t.view(target)
        except RuntimeError:
            assert got is None, (t.shape, t.stride(), target)
            continue
        assert got is not None, (t.shape, t.stride(), target)
        assert torch.equal(torch.as_strided(t, target, got.strides, got.offset), want)


def test_collapse_merges_what_every_operand_walks_as_one() -> None:
    assert collapse((2, 3, 4), [(12, 4, 1), (12, 4, 1)]) == ([24], [[1], [1]])
    assert collapse((2, 3, 4), [(12, 4, 1), (0, 4, 1)]) == ([2, 12], [[12, 1], [0, 1]])
    assert collapse((2, 1, 4), [(4, 9, 1)]) == ([8], [[1]])
    assert collapse((1, 1), [(5, 5)]) == ([], [[]])


def test_memory_order_is_by_stride() -> None:
    assert memory_order((2, 3, 4, 5), (60, 1, 15, 3)) == (0, 2, 3, 1)


@pytest.mark.parametrize("seed", range(20))
def test_live_buffers_never_overlap(seed: int) -> None:
    rng = random.Random(seed)
    buffers = [Buffer(rng.randint(1, 500)) for _ in range(30)]
    code = []
    for k in range(60):
        used = [Array(b, (1,), (1,), 4) for b in rng.sample(buffers[max(0, k // 2 - 6) : k // 2 + 1], 1)]
        used.append(Array(buffers[k // 2], (1,), (1,), 4))
        code.append(Instruction("copy", used, [1], []))
    top = place(code, 128)
    life = lifetimes(code)
    placed = sorted(life, key=lambda b: b.offset or 0)
    for i, a in enumerate(placed):
        assert a.offset is not None and a.offset >= 128 and a.offset % 64 == 0 and a.offset + a.nbytes <= top
        for b in placed[i + 1 :]:
            assert b.offset is not None
            apart = a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset
            never_together = life[a][1] < life[b][0] or life[b][1] < life[a][0]
            assert apart or never_together
