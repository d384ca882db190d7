"""Programs with one field damaged: refused with their place, or harmless."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
from kernel_cases import Call
from test_kernels import CASES, built
from test_program import EXTERNAL as X

from metafast import _C

ARENA = 0
EDGES = [0, -1, 1, 2, 7, 8, 9, 2**31 - 1, 2**31, -(2**31), 2**40, 2**44, 2**62, 2**63 - 1, -(2**63), 2**64, 2**70]
REFUSALS = (ValueError, TypeError, MemoryError)
# What winners of a pool are is known when the program runs, not before.
READS_PLACES = {"pool_gather", "pool_scatter"}


def spec_of(call: Call) -> dict[str, Any]:
    """The call as a program whose operands lie side by side in the arena."""
    places, at = [], 0
    for operand in call.operands:
        places.append((ARENA, at))
        at += -(-operand.storage.numel() * operand.storage.itemsize // 8) * 8
    instruction = [call.kernel, places, list(call.ints), list(call.floats)]
    return dict(
        sections={"query": [instruction]}, arena_bytes=at, accumulator_bytes=8, n_external=1, constants=b"12345678"
    )


def damaged(number: int, dice: random.Random) -> int:
    kind = dice.randrange(3)
    return (
        number ^ 1 << dice.randrange(64)
        if kind == 0
        else dice.choice(EDGES)
        if kind == 1
        else number + dice.choice((-1, 1))
    )


def damage(spec: dict[str, Any], dice: random.Random) -> str:
    """Changes one field; its name."""
    kernel, places, ints, floats = instruction = spec["sections"]["query"][0]
    field = dice.choice(["ints"] * 6 + ["places"] * 3 + ["floats", "sizes", "kernel", "section", "junk"])
    if field == "ints" and ints:
        at = dice.randrange(len(ints))
        ints[at] = damaged(ints[at], dice)
    elif field == "places" and places:
        at = dice.randrange(len(places))
        space, offset = places[at]
        places[at] = (
            (space, damaged(offset, dice)) if dice.random() < 0.5 else (dice.choice([*range(-1, 11), 2**31]), offset)
        )
    elif field == "floats":
        instruction[3] = floats[1:] if floats else [1.0]
    elif field == "sizes":
        name = dice.choice(["arena_bytes", "state_bytes", "adjoint_bytes", "accumulator_bytes", "n_external"])
        spec[name] = damaged(spec.get(name, 0), dice)
    elif field == "kernel":
        instruction[0] = dice.choice([*_C.kernel_names(), kernel[:-1], ""])
    elif field == "section":
        spec["sections"] = {dice.choice(["prologue", "inner", "meta", "epilogue", "", 7, None]): [instruction]}
    else:
        instruction[dice.randrange(4)] = dice.choice([None, 3, "x", [None], [(1, 2, 3)], ["a"], object()])
    return field


def test_constructor_refuses_or_accepts_but_never_crashes() -> None:
    dice, seen = random.Random(0), {True: 0, False: 0}
    for n in range(6000):
        dtype = dice.choice(["f32", "f64"])
        spec = copy.deepcopy(spec_of(built(CASES[n // 20 % len(CASES)], dtype)))
        field = damage(spec, dice)
        try:
            accepted = bool(_C.Program(dtype, **spec).dump())
        except REFUSALS as error:
            accepted = False
            if field in ("ints", "places", "floats", "kernel"):
                assert 'section "query", instruction 0' in str(error), (field, spec["sections"])
        seen[accepted] += 1
    assert min(seen.values()) > 500


def test_what_is_accepted_stays_within_its_memory() -> None:
    """Small changes, so that runs are short; a build with AddressSanitizer sees more than crashes."""
    dice, ran = random.Random(1), 0
    for n in range(3000):
        dtype = dice.choice(["f32", "f64"])
        call = built(CASES[n // 10 % len(CASES)], dtype)
        spec = copy.deepcopy(spec_of(call))
        if call.kernel in READS_PLACES or not call.ints or spec["arena_bytes"] > 2**20:
            continue
        ints = spec["sections"]["query"][0][2]
        at = dice.randrange(len(ints))
        ints[at] = dice.choice([0, 1, 2, 3, 5, -ints[at], ints[at] + 1, ints[at] - 1, 2 * ints[at]])
        try:
            program = _C.Program(dtype, **spec)
        except REFUSALS:
            continue
        assert _C.run(program, np.zeros((1, 3), np.int64), 1, 0)[0] in (0, 1)
        ran += 1
    assert ran > 300


OVERFLOWS = {
    "a size": (("fill", [(X, 0)], [2**62], [0.0]), "beyond 2^44"),
    "a product of scratch": (("gemm", [(X, 0)] * 3, [2**31, 2**31, 2**31, 1, *[0] * 12], []), "beyond 2^44"),
    "hidden by an empty one": (("log_softmax", [(X, 0)] * 2, [2**32, 2**32, 0], []), "beyond 2^44"),
    "dimensions": (("reduce", [(X, 0)] * 2, [9, 0, *[1] * 27, 0, 0], [1.0]), "dimensions kept: 0 to 8 expected, got 9"),
    "no dilation": (("max_pool", [(X, 0)] * 3, [1, 4, 4, 1, 2, 2, 2, 2, 1, 1, 0, 1, 2, 2, 0], []), "dilation"),
    "windows": (("max_pool", [(X, 0)] * 3, [1, 4, 4, 1, *[2] * 4, 0, 0, 1, 1, 3, 2, 0], []), "0 to 2 expected, got 3"),
    "pixels": (("max_pool", [(X, 0)] * 3, [1, 2**20, 2**20, 1, *[2] * 4, 0, 0, 1, 1, 2, 2, 0], []), "2^31 - 1 pixels"),
    "an offset": (("fill", [(X, 2**62)], [1], [0.0]), "an offset within 2^47 bytes"),
}


@pytest.mark.parametrize("case", OVERFLOWS)
def test_sizes_that_overflow_are_refused(case: str) -> None:
    instruction, message = OVERFLOWS[case]
    with pytest.raises(ValueError) as error:
        _C.Program("f32", {"query": [instruction]}, n_external=1)
    assert message in str(error.value)


@pytest.mark.parametrize("size", ["arena_bytes", "state_bytes", "adjoint_bytes", "accumulator_bytes", "n_external"])
def test_spaces_no_memory_holds_are_refused(size: str) -> None:
    with pytest.raises((ValueError, TypeError)):
        _C.Program("f32", {}, **{size: 2**62})
    with pytest.raises((ValueError, TypeError)):
        _C.Program("f32", {}, **{size: -(2**31)})


def test_runs_no_memory_holds_are_refused() -> None:
    meta = {"meta": [("fill", [(1, 0)], [1], [0.0])]}
    program = _C.Program("f32", meta, state_bytes=2**20)
    nothing = np.zeros((0, 3), np.int64)
    with pytest.raises(MemoryError):
        _C.run(program, nothing, 1, 2**40)
    for options in (dict(T=2**41, steps=1), dict(T=1, steps=2**63 - 1)):
        with pytest.raises(ValueError, match=r"at most 2\^40 expected"):
            _C.run(program, nothing, **options)
    reader = _C.Program(
        "f32", {"query": [("reduce", [(X, 0), (0, 0)], [0, 0, 0, 0], [1.0])]}, arena_bytes=4, n_external=1
    )
    with pytest.raises(ValueError, match="external 0: strides beyond all memory"):
        _C.run(reader, np.array([[64, 2**60, 0]], np.int64), 8, 0)


@pytest.mark.parametrize(
    "sections,message",
    [
        ({7: []}, "sections are named, got 7"),
        ({"query": 3}, 'section "query": a list of instructions expected, got 3'),
        ({"query": "fill"}, 'section "query": a list of instructions expected'),
        ({"query": [3]}, 'section "query", instruction 0: .* expected, got 3'),
        ({"query": [("fill", [(X, 0)], [2**70], [0.0])]}, 'section "query", instruction 0: '),
    ],
)
def test_what_is_no_program_is_refused(sections: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        _C.Program("f32", sections)
