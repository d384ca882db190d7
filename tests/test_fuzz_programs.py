"""Programs with one field damaged: refused with their place, or harmless."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from kernel_cases import OIHW, Call, Case, Draw, Geometry, given, weight
from test_kernels import CASES, anything, built
from test_program import CHUNK
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


def by_transformed_filters() -> Iterator[Case]:
    """What takes filters of Winograd's form, or makes them: float64 has none."""
    g = Geometry(2, 5, 4, 17, 16)

    def make(draw: Draw, kernel: str, adjoint: bool) -> Call:
        x, y, w = draw.dense(g.N, g.H, g.W, g.C), draw.dense(g.N, *g.out, g.O), weight(draw, g.O, g.C, 3, 3, OIHW)
        room = draw.flat(_C.winograd_filter_elements(*((g.O, g.C) if adjoint else (g.C, g.O))))
        source, out = (y, x) if adjoint else (x, y)
        if kernel == "winograd_filters":
            return Call(kernel, [given(w), anything(room)], [*g.ints(w, 0, 1, 0), int(adjoint)])
        return Call(kernel, [given(source), given(room), anything(out)], g.ints(w, 0, 2, 0))

    for kernel, adjoint in [("conv_fwd", False), ("conv_dx", True), ("winograd_filters", False)]:
        yield Case(f"{kernel} of transformed filters", partial(make, kernel=kernel, adjoint=adjoint))


ALL = [*by_transformed_filters(), *CASES]


def in_chunks(spec: dict[str, Any], count: int, dice: random.Random) -> dict[str, Any]:
    """The same `count` times, as chunks; some operands lie in a chunk's memory."""
    kernel, places, ints, floats = spec["sections"]["query"][0]
    ends = [*(offset for _, offset in places[1:]), spec["arena_bytes"]]
    member = [
        kernel,
        [
            (CHUNK, offset, 0) if dice.random() < 0.3 else (ARENA, count * offset, end - offset)
            for (_, offset), end in zip(places, ends, strict=True)
        ],
        ints,
        floats,
    ]
    row = ["chunks", [], [count, spec["arena_bytes"]], [], [member]]
    return spec | {"sections": {"query": [row]}, "arena_bytes": count * spec["arena_bytes"]}


def specification(case: Case, dtype: str, dice: random.Random) -> dict[str, Any]:
    """A program of the case; of every third, one that does it chunk by chunk."""
    spec = copy.deepcopy(spec_of(built(case, dtype)))
    return in_chunks(spec, dice.choice([1, 2, 3]), dice) if dice.random() < 1 / 3 else spec


def one_of(spec: dict[str, Any], dice: random.Random) -> list[Any]:
    """The instruction, or its member."""
    instruction: list[Any] = spec["sections"]["query"][0]
    return instruction[4][0] if len(instruction) > 4 and dice.random() < 0.8 else instruction


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
    instruction = one_of(spec, dice)
    kernel, places, ints, floats = instruction[:4]
    field = dice.choice(["ints"] * 6 + ["places"] * 3 + ["floats", "sizes", "kernel", "section", "junk"])
    if field == "ints" and ints:
        at = dice.randrange(len(ints))
        ints[at] = damaged(ints[at], dice)
    elif field == "places" and places:
        at = dice.randrange(len(places))
        place = list(places[at])
        n = dice.randrange(1, len(place))
        if dice.random() < 0.5:
            place[n] = damaged(place[n], dice)
        else:
            place[0] = dice.choice([*range(-1, 11), 2**31])
        places[at] = tuple(place)
    elif field == "floats":
        instruction[3] = floats[1:] if floats else [1.0]
    elif field == "sizes":
        name = dice.choice(["arena_bytes", "state_bytes", "adjoint_bytes", "accumulator_bytes", "n_external"])
        spec[name] = damaged(spec.get(name, 0), dice)
    elif field == "kernel":
        instruction[0] = dice.choice([*_C.kernel_names(), kernel[:-1], ""])
    elif field == "section":
        spec["sections"] = {
            dice.choice(["prologue", "inner", "meta", "epilogue", "", 7, None]): spec["sections"]["query"]
        }
    else:
        instruction[dice.randrange(len(instruction))] = dice.choice(
            [None, 3, "x", [None], [(1, 2, 3)], ["a"], object()]
        )
    return field


def test_constructor_refuses_or_accepts_but_never_crashes() -> None:
    dice, seen = random.Random(0), {True: 0, False: 0}
    for n in range(6000):
        dtype = dice.choice(["f32", "f64"])
        spec = specification(ALL[n // 20 % len(ALL)], dtype, dice)
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
        call = built(ALL[n // 10 % len(ALL)], dtype)
        spec = specification(ALL[n // 10 % len(ALL)], dtype, dice)
        if call.kernel in READS_PLACES or not call.ints or spec["arena_bytes"] > 2**20:
            continue
        ints = one_of(spec, dice)[2]
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


def test_a_list_that_holds_itself_is_refused() -> None:
    row: list[Any] = ["chunks", [], [1, 0], [], []]
    row[4].append(row)
    with pytest.raises(ValueError, match='section "query", instruction 0: '):
        _C.Program("f32", {"query": [row]})


def test_float64_has_no_transformed_filters() -> None:
    """Its kernels know none: they would read weights by strides that nothing has checked."""
    for case in by_transformed_filters():
        with pytest.raises(ValueError, match="float32 expected"):
            _C.Program("f64", **spec_of(built(case, "f64")))
        assert _C.Program("f32", **spec_of(built(case, "f32")))


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
