"""Clusters as machine code give the same bits as the interpreter, whatever the operations, strides and numbers."""

from __future__ import annotations

import ctypes
import math
import random
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from machines import _C, MACHINE
from torch import Tensor

OPCODES = _C.pointwise_opcodes()
COMPILED = {
    **dict.fromkeys(["copy", "neg", "sqrt", "rsqrt", "recip", "abs", "sign", "relu", "step", "square"], 1),
    **dict.fromkeys(["add", "sub", "mul", "div", "maximum", "minimum", "gt", "ge", "lt", "le", "eq", "ne"], 2),
    **dict.fromkeys(["where", "where_positive", "fma"], 3),
}  # and how many operands each has
DTYPES = {"f32": torch.float32, "f64": torch.float64}
SPECIAL = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-40, -1e-40, 3e38, -2.5]
EACH_ISA = pytest.mark.parametrize("isa", MACHINE.isas())
IN_THIS_PROCESS = pytest.mark.skipif(MACHINE.isas() == ["best"], reason="counts what this machine made")
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES)


class Cluster:
    """A pointwise call under construction."""

    def __init__(self, dims: tuple[int, ...], dtype: str, seed: int, special: float = 0.2) -> None:
        self.dims, self.dtype, self.special = dims, DTYPES[dtype], special
        self.random = torch.Generator().manual_seed(seed)
        self.inputs: list[Tensor] = []
        self.outputs: list[tuple[int, Tensor, int]] = []  # register, where it goes, mode
        self.ops: list[list[int]] = []
        self.floats: list[float] = []

    def numbers(self, strides: Sequence[int]) -> Tensor:
        count = 1 + sum((n - 1) * s for n, s in zip(self.dims, strides, strict=True))
        drawn = torch.randn(count, generator=self.random, dtype=torch.float64)
        odd = torch.rand(count, generator=self.random) < self.special
        drawn[odd] = torch.tensor(SPECIAL).double()[torch.randint(len(SPECIAL), (count,), generator=self.random)[odd]]
        return drawn.to(self.dtype).as_strided(self.dims, list(strides))

    def dense(self) -> tuple[int, ...]:
        return torch.empty(self.dims, device="meta").stride()

    def input(self, strides: Sequence[int] | None = None) -> int:
        self.inputs.append(self.numbers(self.dense() if strides is None else strides))
        return len(self.inputs) - 1

    def op(self, name: str, dst: int, *sources: int) -> int:
        self.ops.append([OPCODES.index(name), dst, *sources, *[0] * (3 - len(sources))])
        return dst

    def out(self, register: int, mode: int = 0, strides: Sequence[int] | None = None) -> None:
        self.outputs.append((register, self.numbers(self.dense() if strides is None else strides), mode))

    def run(self, isa: str, compiled: bool, parts: int = 1) -> list[Tensor]:
        """What the outputs hold afterwards."""
        storages = [t.untyped_storage().clone() for _, t, _ in self.outputs]
        made = [torch.empty(0, dtype=self.dtype).set_(s) for s in storages]
        tensors = [*self.inputs, *(t for _, t, _ in self.outputs)]
        registers = 1 + max([len(self.inputs) - 1, *(op[1] for op in self.ops)])
        ints = [len(self.dims), len(self.inputs), len(self.outputs), len(self.ops), registers, *self.dims]
        ints += [s for t in tensors for s in t.stride()]
        ints += [r for r, _, _ in self.outputs] + [m for _, _, m in self.outputs]
        ints += [i for op in self.ops for i in op] + [int(compiled)]
        dtype = "f32" if self.dtype == torch.float32 else "f64"
        status = MACHINE.run_kernel("pointwise", dtype, isa, [*self.inputs, *made], ints, self.floats, parts=parts)
        assert status == 0
        return made


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """But for which NaN it is."""
    return all(
        bool(((x.view(torch.uint8) == y.view(torch.uint8)).view(-1, x.itemsize).all(1) | (x.isnan() & y.isnan())).all())
        for x, y in zip(a, b, strict=True)
    )


def random_cluster(seed: int, dtype: str) -> Cluster:
    """Up to 12 operations on up to 6 inputs, each dense, the same in some dimensions, or with a gap between rows."""
    dice = random.Random(seed)
    dims = dice.choice([(64,), (5, 40), (10, 6, 16), (3, 48), (7, 33), (2, 3, 5, 8), (4, 1500), (1, 17), (300, 16)])
    c = Cluster(dims, dtype, seed)
    dense = c.dense()
    for _ in range(dice.randint(1, 6)):
        if len(dims) == 2 and dice.random() < 0.2:
            c.input((dims[1] + 3, 1))
        else:
            c.input([0 if dice.random() < 0.25 else s for s in dense])
    c.floats = [dice.choice([0.0, 1.0, -0.5, 2.0]) for _ in range(dice.randint(1, 3))]
    registers = len(c.inputs)
    for _ in range(dice.randint(1, 12)):
        name = dice.choice(list(COMPILED))
        sources = [dice.randrange(-len(c.floats), registers) for _ in range(COMPILED[name])]
        again = registers > len(c.inputs) and dice.random() < 0.3
        c.op(name, dice.randrange(len(c.inputs), registers) if again else registers, *sources)
        registers += not again
    for _ in range(dice.randint(1, 3)):
        c.out(dice.randrange(registers), mode=dice.randint(0, 1))
    return c


@EACH_ISA
@EACH_DTYPE
@pytest.mark.parametrize("block", range(8))
def test_random_clusters(block: int, dtype: str, isa: str) -> None:
    for seed in range(50 * block, 50 * block + 50):
        c = random_cluster(seed, dtype)
        expected = c.run(isa, compiled=False)
        for parts in (1, 3):
            assert same_bits(c.run(isa, compiled=True, parts=parts), expected), f"seed {seed}, {parts} parts"


@EACH_ISA
@EACH_DTYPE
@pytest.mark.parametrize("name", COMPILED)
def test_every_operation_on_every_pair_of_special_numbers(name: str, dtype: str, isa: str) -> None:
    c = Cluster((1331,), dtype, 0)
    grid = torch.cartesian_prod(*[torch.tensor(SPECIAL, dtype=DTYPES[dtype])] * 3)
    for k in range(COMPILED[name]):
        c.input()
        c.inputs[k].copy_(grid[:, k])
    c.out(c.op(name, COMPILED[name], *range(COMPILED[name])))
    assert same_bits(c.run(isa, compiled=True), c.run(isa, compiled=False))


@EACH_ISA
@EACH_DTYPE
@pytest.mark.parametrize("inputs,live,rows", [(14, 0, 6), (30, 0, 6), (3, 40, 6), (3, 0, 900), (14, 0, 900)])
def test_more_operands_than_general_registers_and_more_values_than_vectors(
    inputs: int, live: int, rows: int, dtype: str, isa: str
) -> None:
    """Addresses are then read from memory; where vectors do not suffice, the interpreter runs. What is large is fetched
    ahead."""
    c = Cluster((rows, 80), dtype, 1)
    for k in range(inputs):
        c.input((83 + k, 1))
    last = inputs - 1
    for k in range(live):  # all of them live until the end
        c.op("add", inputs + k, last, k % inputs)
        last = inputs + k
    total = c.op("add", inputs + live, 0, 1)
    for k in range(2, inputs + live):
        c.op("add", total, total, k)
    c.out(total)
    assert same_bits(c.run(isa, compiled=True), c.run(isa, compiled=False))


@EACH_ISA
@EACH_DTYPE
def test_sums_are_those_of_the_interpreter_but_for_rounding(dtype: str, isa: str) -> None:
    for dims, strides in [
        ((40, 48), (0, 1)),
        ((9, 40, 16), (0, 0, 1)),
        ((5000, 32), (0, 0)),
        ((3, 70, 64), (64, 0, 1)),
    ]:
        c = Cluster(dims, dtype, 2, special=0)
        c.input(), c.input([0 if s == 0 else d for s, d in zip(strides, c.dense(), strict=True)])
        product = c.op("mul", 2, 0, 1)
        c.out(product), c.out(product, 2, strides), c.out(product, 3, strides)
        compiled, interpreted = c.run(isa, compiled=True), c.run(isa, compiled=False)
        assert same_bits(compiled[:1], interpreted[:1])
        # Of two sums, each of at most 64 blocks of 64 vectors in a chain, half an eps a term (pointwise.hpp)
        bound = 5000 * torch.finfo(DTYPES[dtype]).eps
        for a, b in zip(compiled, interpreted, strict=True):
            torch.testing.assert_close(a, b, rtol=bound, atol=bound)


@IN_THIS_PROCESS
@EACH_ISA
@EACH_DTYPE
def test_code_is_made_once_for_like_clusters_and_none_where_it_is_not_wanted(dtype: str, isa: str) -> None:
    def cluster(n: int) -> Cluster:
        c = Cluster((4, n), dtype, 3)
        c.input()
        c.input((0, 1))
        last = 0
        for k, name in enumerate(["square", "sub", "abs", "sqrt", "sub", "abs", "recip", "maximum"]):
            last = c.op(name, 2 + k, *[last, 1][: COMPILED[name]])
        c.out(last)
        return c

    before = _C.code_pieces()
    cluster(80).run(isa, compiled=False)
    assert _C.code_pieces() == before
    for n in (80, 80, 160):  # other sizes are the same code where rows end with a vector
        cluster(n).run(isa, compiled=True)
    # the pitch from row to row is part of it
    assert _C.code_pieces() - before == (2 if isa in ("avx2", "avx512") else 0)


@IN_THIS_PROCESS
@EACH_ISA
@pytest.mark.parametrize("dims,strides", [((40, 2, 5), (5, 0, 1)), ((90, 3), (0, 1))])
def test_strips_too_short_to_be_worth_it_are_interpreted(
    dims: tuple[int, ...], strides: Sequence[int], isa: str
) -> None:
    c = Cluster(dims, "f32", 5)
    c.input(), c.input(strides)
    c.out(c.op("mul", 2, 0, 1))
    before = _C.code_pieces()
    assert same_bits(c.run(isa, compiled=True), c.run(isa, compiled=False))
    assert _C.code_pieces() == before


COPIES = """
import array, ctypes, importlib.util, sys
module, isa, first, last, denied = sys.argv[1:]
if int(denied):  # from now on no page becomes executable
    assert ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) == 0
spec = importlib.util.spec_from_file_location("metafast._C", module)
_C = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_C)
numbers = array.array("f", range(16 + int(last)))
for pitch in range(int(first), int(last)):
    made = array.array("f", [0.0] * 32)
    ints = [2, 1, 1, 0, 1, 2, 16, pitch, 1, 16, 1, 0, 0, 1]
    _C.run_kernel("pointwise", "f32", isa, [numbers.buffer_info()[0], made.buffer_info()[0]], ints, [])
    assert made == numbers[:16] + numbers[pitch : pitch + 16]
print(_C.code_pieces())
"""


def pieces_of_copies(isa: str, first: int, last: int, *, denied: bool = False) -> int:
    """How many pieces of code a process has that copies two rows which lie `first`, … `last` - 1 numbers apart."""
    command = [sys.executable, "-c", COPIES, _C.__file__, isa, str(first), str(last), str(int(denied))]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@IN_THIS_PROCESS
@EACH_ISA
def test_a_process_has_so_many_pieces_and_no_more(isa: str) -> None:
    pieces = pieces_of_copies(isa, 17, 4500)
    assert pieces == (4096 if isa in ("avx2", "avx512") else 0)


@IN_THIS_PROCESS
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux to deny it")
def test_the_interpreter_runs_where_no_page_may_be_executed() -> None:
    if ctypes.CDLL(None).prctl(66, 0, 0, 0, 0) < 0:  # PR_GET_MDWE
        pytest.skip("needs Linux 6.3")
    widest = _C.isas()[-1]
    assert pieces_of_copies(widest, 17, 20) == (3 if widest in ("avx2", "avx512") else 0)
    assert pieces_of_copies(widest, 17, 20, denied=True) == 0


@IN_THIS_PROCESS
@EACH_ISA
def test_a_function_that_is_many_instructions_is_interpreted(isa: str) -> None:
    c = Cluster((64,), "f32", 4)
    c.input()
    c.out(c.op("exp", 1, 0))
    before = _C.code_pieces()
    assert same_bits(c.run(isa, compiled=True), c.run(isa, compiled=False))
    assert _C.code_pieces() == before
