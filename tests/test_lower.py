"""Lowering's parts: views as strides, and a plan in which live buffers never overlap."""

from __future__ import annotations

import random

import pytest
import torch

from metafast.lower.arrays import STATE, STATE_NEXT, Array, Buffer, Instruction, collapse, memory_order, reshaped
from metafast.lower.bundle import bundle
from metafast.lower.inplace import over_current
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


# ---- rows of alike instructions -------------------------------------------------------------------------------


def doubling(a: Array, b: Array, n: int) -> Instruction:
    """b = a + a over n elements; add is opcode 1."""
    return Instruction("pointwise", [a, b], [1], [1, 1, 1, 1, 2, n, 1, 1, 1, 0, 1, 1, 0, 0, 0])


def flat(n: int, space: int | None = None, offset: int | None = None) -> Array:
    return Array(Buffer(4 * n, space, offset), (n,), (1,), 4)


def test_alike_instructions_become_one_row() -> None:
    sizes = (40, 1600, 1)
    offsets = (0, 192, 192 + 6400)
    grads = [flat(n) for n in sizes]
    made = [Instruction("reduce", [g], [0], []) for g in grads]
    updates = [doubling(g, flat(n, STATE_NEXT, o), n) for g, n, o in zip(grads, sizes, offsets, strict=True)]
    code = bundle([made[0], updates[0], made[1], made[2], updates[2], updates[1]], set())
    assert [ins.kernel for ins in code] == ["reduce", "reduce", "reduce", "pointwise"]
    assert code[-1].ints[5] == (192 + 6400) // 4 + 1
    place(code, 64)
    start = grads[0].buffer.offset
    assert start is not None and code[-1].operands[0].buffer.offset == start
    assert [g.buffer.offset for g in grads] == [start + o for o in offsets]


def test_a_row_ends_where_somebody_reads_in_between() -> None:
    grads, states = [flat(16), flat(16)], [flat(16, STATE_NEXT, 0), flat(16, STATE_NEXT, 64)]
    first, second = (doubling(g, s, 16) for g, s in zip(grads, states, strict=True))
    reader = Instruction("reduce", [states[0], grads[1]], [1], [])
    assert bundle([first, reader, second], set()) == [first, reader, second]


@pytest.mark.parametrize("why", ["pinned", "gap", "same"])
def test_arrays_that_cannot_lie_in_a_row_stay_apart(why: str) -> None:
    grads = [flat(16), flat(16)]
    states = [flat(16, STATE_NEXT, 0), flat(16, STATE_NEXT, 128 if why == "gap" else 64)]
    if why == "same":
        grads[1] = grads[0]
    code = [doubling(g, s, 16) for g, s in zip(grads, states, strict=True)]
    assert bundle(code, {grads[0].buffer} if why == "pinned" else set()) == code


# ---- over what is read last -----------------------------------------------------------------------------------


def test_an_array_lies_over_the_one_that_is_read_last_where_it_is_made() -> None:
    first, second, third = flat(16), flat(16), flat(16)
    place([doubling(first, second, 16), doubling(second, third, 16)], 0)
    assert first.buffer.offset == second.buffer.offset == third.buffer.offset == 0
    first, second, third = flat(16), flat(16), flat(16)
    place([doubling(first, second, 16), doubling(first, third, 16)], 0)  # read again
    assert first.buffer.offset != second.buffer.offset


def test_a_step_writes_over_its_own_state_where_nobody_reads_that_later() -> None:
    old, new = flat(16, STATE, 0), flat(16, STATE_NEXT, 0)
    other, made = flat(16, STATE, 64), flat(16)
    assert over_current([doubling(old, made, 16), doubling(old, new, 16)], STATE, STATE_NEXT)
    assert not over_current([doubling(old, new, 16), doubling(old, made, 16)], STATE, STATE_NEXT)
    assert not over_current([doubling(other, new, 16), doubling(old, made, 16)], STATE, STATE_NEXT)
    assert not over_current([doubling(flat(16, STATE, 32), new, 16)], STATE, STATE_NEXT)
    assert not over_current([Instruction("reduce", [old, new], [1], [])], STATE, STATE_NEXT)
