"""The native kernels one by one, on every instruction set this machine runs, against PyTorch in float64.

Each case runs in storages with guard elements around them, once in one part and once in three; the parts together
must write the same bits.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from kernel_cases import (
    CONVOLUTIONS,
    HWIO,
    OIHW,
    Call,
    Case,
    Draw,
    Geometry,
    Operand,
    conv,
    conv_cases,
    gemm_cases,
    given,
    middle_cases,
    pool_cases,
    reduce_cases,
    small_cases,
    wanted,
    weight,
)
from machines import _C, MACHINE
from torch import Tensor
from torch.nn import functional as F

from metafast.ops import TABLE

GUARD = 64  # elements before and after every operand
DTYPES = {"f32": torch.float32, "f64": torch.float64}
EACH_ISA = pytest.mark.parametrize("isa", MACHINE.isas())
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES)


class Guarded:
    """A copy of an operand's storage between guards that nothing may touch."""

    def __init__(self, operand: Operand) -> None:
        n = operand.storage.numel()
        self.whole = torch.full((n + 2 * GUARD,), 77, dtype=operand.storage.dtype)
        self.inner = self.whole[GUARD : GUARD + n]
        self.inner.copy_(operand.storage)
        self.operand = operand

    def intact(self) -> bool:
        return bool((self.whole[:GUARD] == 77).all() and (self.whole[-GUARD:] == 77).all())


def run(call: Call, dtype: str, isa: str, parts: int = 1) -> list[Tensor]:
    """What the operands hold afterwards; their guards and the inputs are checked."""
    operands = [Guarded(o) for o in call.operands]
    status = MACHINE.run_kernel(
        call.kernel, dtype, isa, [o.inner for o in operands], call.ints, call.floats, parts=parts
    )
    assert status == call.status
    for k, o in enumerate(operands):
        assert o.intact(), f"{call.kernel}: operand {k} was written beyond its end"
        if o.operand.expected is None:
            assert bits_equal(o.inner, o.operand.storage), f"{call.kernel}: input {k} was changed"
    return [o.inner for o in operands]


def bits_equal(a: Tensor, b: Tensor) -> bool:
    return a.numpy().tobytes() == b.contiguous().numpy().tobytes()


def check(call: Call, results: list[Tensor]) -> None:
    for k, (operand, got) in enumerate(zip(call.operands, results, strict=True)):
        if operand.expected is None:
            continue
        expected, bound = operand.expected, operand.bound
        same = (got.double() == expected) | (got.double().isnan() & expected.isnan())
        off = (got.double() - expected).abs()
        bad = ~(same | (off <= bound))
        if bad.any():
            at = int((off / bound.clamp_min(1e-300)).nan_to_num(torch.inf).masked_fill(~bad, -1).argmax())
            pytest.fail(
                f"operand {k}: {int(bad.sum())} of {bad.numel()} elements are off; at {at} expected "
                f"{expected[at]:.9g} ± {bound[at]:.3g}, got {got[at]:.9g}"
            )


def all_cases() -> Iterator[Case]:
    yield from itertools.chain(
        gemm_cases(),
        conv_cases(),
        reduce_cases(),
        middle_cases(),
        pool_cases(),
        small_cases(),
        pointwise_cases(),
    )


# ---- pointwise ------------------------------------------------------------------------------------

EXACT: dict[str, Callable[..., Tensor]] = {
    "copy": lambda a: a,
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "neg": torch.neg,
    "abs": torch.abs,
    "sign": torch.sign,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "relu": torch.relu,
    "step": lambda a: (a > 0).to(a.dtype),
    "gt": lambda a, b: (a > b).to(a.dtype),
    "ge": lambda a, b: (a >= b).to(a.dtype),
    "lt": lambda a, b: (a < b).to(a.dtype),
    "le": lambda a, b: (a <= b).to(a.dtype),
    "eq": lambda a, b: (a == b).to(a.dtype),
    "ne": lambda a, b: (a != b).to(a.dtype),
    "where": lambda a, b, c: torch.where(a != 0, b, c),
    "where_positive": lambda a, b, c: torch.where(a > 0, b, c),
    "fma": lambda a, b, c: a * b + c,
    "square": torch.square,
    "floor": torch.floor,
}

# Units in the last place of the float32 result, as math.hpp states them.
ROUNDED: dict[str, tuple[Callable[..., Tensor], float]] = {
    "div": (torch.div, 0.51),
    "sqrt": (torch.sqrt, 0.51),
    "rsqrt": (torch.rsqrt, 1.6),
    "recip": (torch.reciprocal, 0.51),
    "exp": (torch.exp, 2),
    "log": (torch.log, 2),
    "expm1": (torch.expm1, 2),
    "log1p": (torch.log1p, 2),
    "erf": (torch.erf, 2),
    "sin": (torch.sin, 2),
    "cos": (torch.cos, 2),
    "atan": (torch.atan, 2),
    "tanh": (torch.tanh, 4),
    "sigmoid": (torch.sigmoid, 4),
    "softplus": (lambda a: torch.logaddexp(a, torch.zeros((), dtype=a.dtype)), 4),
    "pow": (torch.pow, 2),
}


class Program:
    """A pointwise program under construction; works on integer values, so that its results are exact."""

    def __init__(self, draw: Draw, dims: tuple[int, ...], compiled: bool = True) -> None:
        self.draw, self.dims, self.compiled = draw, dims, compiled
        self.inputs: list[Tensor] = []
        self.values: list[Tensor] = []
        self.ops: list[tuple[int, ...]] = []
        self.outs: list[tuple[int, Tensor, int, bool]] = []  # register, view, mode, aliases an input
        self.immediates: list[float] = []

    def input(self, strides: tuple[int, ...] | None = None) -> int:
        strides = torch.empty(self.dims).stride() if strides is None else strides
        view = self.draw.strided(self.dims, strides)
        view.as_strided((view.untyped_storage().nbytes() // view.element_size(),), (1,), 0).mul_(3).round_()
        self.inputs.append(view)
        self.values.append(view.double())
        return len(self.inputs) - 1

    def immediate(self, value: float) -> int:
        self.immediates.append(value)
        return -len(self.immediates)

    def op(self, name: str, *sources: int, into: int | None = None) -> int:
        dst = len(self.values) if into is None else into
        args = [self.values[s] if s >= 0 else torch.tensor(self.immediates[-1 - s]).double() for s in sources]
        value = EXACT[name](*args)
        if into is None:
            self.values.append(value)
        else:
            self.values[into] = value
        self.ops.append((_C.pointwise_opcodes().index(name), dst, *sources, *[0] * (3 - len(sources))))
        return dst

    def out(self, register: int, strides: tuple[int, ...] | None = None, mode: int = 0) -> None:
        strides = torch.empty(self.dims).stride() if strides is None else strides
        view = self.draw.strided(self.dims, strides)
        view.as_strided((view.untyped_storage().nbytes() // view.element_size(),), (1,), 0).mul_(3).round_()
        self.outs.append((register, view, mode, False))

    def call(self) -> Call:
        views = [*self.inputs, *(v for _, v, _, _ in self.outs)]
        ints = [len(self.dims), len(self.inputs), len(self.outs), len(self.ops), len(self.values), *self.dims]
        ints += [s for v in views for s in v.stride()]
        ints += [r for r, *_ in self.outs] + [m for _, _, m, _ in self.outs]
        ints += [i for op in self.ops for i in op] + [int(self.compiled)]
        outs = [self.result(v, self.values[r], m) for r, v, m, _ in self.outs]
        for o in outs:
            o.bound = torch.zeros_like(o.bound)
        return Call("pointwise", [*map(given, self.inputs), *outs], ints, self.immediates)

    def result(self, view: Tensor, value: Tensor, mode: int) -> Operand:
        if mode >= 2:  # a sum over the dimensions of stride 0
            added = [d for d, s in enumerate(view.stride()) if s == 0]
            kept = [d for d, s in enumerate(view.stride()) if s != 0]
            view = view.as_strided([view.shape[d] for d in kept], [view.stride(d) for d in kept])
            value = value.sum(added) if added else value
        return wanted(view, value, 0.0, add=bool(mode % 2))


LAYOUTS: dict[str, tuple[tuple[int, ...], list[tuple[int, ...] | None]]] = {
    "one element, rank 0": ((), [None, None]),
    "one element": ((1, 1), [None, (0, 0)]),
    "tiny": ((10,), [None, None, (0,)]),
    "long": ((5003,), [None, (2,), (0,)]),
    "merged": ((7, 30, 11), [None, None]),
    "bias": ((10, 40), [None, (0, 1)]),
    "bias of images": ((3, 6, 5, 64), [None, (0, 0, 0, 1)]),
    "odd bias": ((333, 7), [None, (0, 1), (1, 0)]),
    "outer product": ((60, 45), [(1, 0), (0, 1), (48, 1), (2, 0), None]),
    "outer product of images": ((3, 6, 5, 64), [(0, 0, 0, 1), (30, 5, 1, 0), (2, 0, 0, 0), (0, 0, 66, 1), None]),
    "long rows": ((3, 1500), [None, (1, 0), (0, 1)]),
    "long rows, loose": ((3, 1500), [(1501, 1), (3000, 2), (1, 3)]),
    "transposed": ((37, 41), [None, (1, 37)]),
    "batched": ((5, 4, 3), [(1, 15, 5), (0, 3, 1), (4, 1, 0)]),
    "per image": ((4, 9, 16), [None, (16, 0, 1), (1, 0, 0)]),
    "padded": ((6, 5, 4), [(100, 10, 2), None]),
    "empty": ((3, 0, 2), [None, None]),
}


def pointwise_cases() -> Iterator[Case]:
    for compiled in (True, False):
        yield from each_pointwise_case(compiled)


def each_pointwise_case(compiled: bool) -> Iterator[Case]:
    how = "compiled" if compiled else "interpreted"

    def mixed(name: str, out: str) -> Case:
        dims, layouts = LAYOUTS[name]

        def make(draw: Draw) -> Call:
            p = Program(draw, dims, compiled)
            xs = [p.input(s) for s in layouts]
            y = p.op("mul", xs[0], p.immediate(2.0))
            for x in xs[1:]:
                y = p.op("add", y, x)
            z = p.op("maximum", y, p.immediate(-1.0))
            w = p.op("where", p.op("gt", z, xs[0]), y, p.op("sub", z, y))
            p.out(w, mode=out == "+=", strides=gaps(dims) if out == "loose" else None)
            p.out(z, mode=0)
            p.out(xs[-1], strides=reversed_order(dims) if out == "loose" else None, mode=out == "+=")
            return p.call()

        return Case(f"pointwise {how} {name} {out}", make)

    for name, out in itertools.product(LAYOUTS, ("=", "+=", "loose")):
        yield mixed(name, out)

    def summed(dims: tuple[int, ...], strides: tuple[int, ...], mode: int, first: bool) -> Case:
        def make(draw: Draw) -> Call:
            p = Program(draw, dims, compiled)
            a, b = p.input(), p.input(strides)
            y = p.op("sub", p.op("add", a, a), b)
            if first:
                p.out(y, strides, mode)
            p.out(y)
            p.out(a, (0,) * len(dims), 5 - mode)
            p.out(b, strides, mode)
            return p.call()

        return Case(f"pointwise {how} {dims} summed to {strides} mode{mode} first{first}", make)

    for k, (dims, strides) in enumerate(SUMS):
        yield summed(dims, strides, 2 + k % 2, first=False)
        yield summed(dims, strides, 3 - k % 2, first=True)

    def summed_in_groups(dims: tuple[int, ...], strides: tuple[int, ...], mode: int) -> Case:
        """Every sum keeps the outermost dim, whose indices parts of a call share."""

        def make(draw: Draw) -> Call:
            p = Program(draw, dims, compiled)
            a, b = p.input(), p.input(strides)
            y = p.op("sub", p.op("add", a, a), b)
            p.out(y)
            p.out(y, strides, mode)
            p.out(a, (3, *[0] * (len(dims) - 1)), 5 - mode)
            return p.call()

        return Case(f"pointwise {how} {dims} summed in groups to {strides} mode{mode}", make)

    for k, (dims, strides) in enumerate(GROUPED_SUMS):
        yield summed_in_groups(dims, strides, 2 + k % 2)
        yield summed_in_groups(dims, strides, 3 - k % 2)


GROUPED_SUMS = [
    ((5, 90, 64), (64, 0, 1)),
    ((2, 3000, 21), (25, 0, 1)),
    ((7, 40, 3), (4, 0, 1)),
    ((4, 2, 3, 5), (5, 0, 0, 1)),
    ((3, 1500), (1, 0)),
    ((6, 70000), (2, 0)),
    ((3, 0, 4), (4, 0, 1)),
]
SUMS = [
    ((400,), (0,)),
    ((5003,), (0,)),
    ((10, 40), (0, 1)),
    ((333, 7), (0, 1)),
    ((333, 7), (0, 0)),
    ((3, 6, 5, 64), (0, 0, 0, 1)),
    ((300, 3, 64), (0, 0, 1)),
    ((3, 1500), (0, 1)),
    ((70000,), (0,)),
    ((70000, 2), (0, 1)),
    ((1,), (0,)),
    ((0,), (0,)),
    ((0, 7), (0, 1)),
    ((3, 0, 21), (0, 0, 1)),
    ((4, 0), (0, 0)),
]


def gaps(dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(3 * s + (2 if k == 0 else 0) for k, s in enumerate(torch.empty(dims).stride()))


def reversed_order(dims: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(reversed(torch.empty(dims[::-1]).stride()))


CASES = list(all_cases())


@functools.lru_cache(maxsize=2)
def built(case: Case, dtype: str) -> Call:
    return case.make(Draw(DTYPES[dtype]))


@EACH_ISA
@EACH_DTYPE
@pytest.mark.parametrize("case", CASES, ids=str)
def test_case(case: Case, dtype: str, isa: str) -> None:
    call = built(case, dtype)
    whole = run(call, dtype, isa)
    check(call, whole)
    if call.status:
        return  # the call ends with the part that failed
    for a, b in zip(whole, run(call, dtype, isa, parts=3), strict=True):
        assert bits_equal(a, b), "the result depends on the number of parts"


@EACH_ISA
@EACH_DTYPE
@pytest.mark.parametrize("parts", [1, 3])
def test_what_may_lie_over_an_input(parts: int, dtype: str, isa: str) -> None:
    written_over = {"standardize": (1, 0), "project": (3, 0), "project_tangent": (5, 0)}
    written_over |= {"log_softmax": (1, 0), "cumsum": (1, 0)}
    for case in middle_cases():
        call = built(case, dtype)
        if call.kernel not in written_over:
            continue
        out, over = written_over[call.kernel]
        if call.kernel.startswith("project") and call.ints[3]:
            continue  # it adds
        apart = run(call, dtype, isa)
        held = [operand.storage.clone() for operand in call.operands]
        held[out] = held[over]
        status = MACHINE.run_kernel(call.kernel, dtype, isa, held, call.ints, call.floats, parts=parts)
        assert status == 0 and bits_equal(held[out], apart[out]), case


@EACH_ISA
@EACH_DTYPE
@pytest.mark.parametrize("dims", [(10, 40), (3000,), (5, 700)], ids=str)
def test_pointwise_updates_an_input_in_place(dims: tuple[int, ...], dtype: str, isa: str) -> None:
    draw = Draw(DTYPES[dtype])
    p = Program(draw, dims)
    w, g = p.input(), p.input()
    new = p.op("sub", w, p.op("mul", g, p.immediate(2.0)))
    again = p.op("add", new, w)  # w is read after what replaces it is known
    p.out(new), p.out(again)
    call = p.call()
    held = [storage.storage.clone() for storage in call.operands]
    held[2] = held[0]  # new overwrites w
    status = MACHINE.run_kernel("pointwise", dtype, isa, held, call.ints, call.floats)
    assert status == 0
    assert torch.equal(held[0].double(), call.operands[2].expected)
    assert torch.equal(held[3].double(), call.operands[3].expected)


@EACH_ISA
@EACH_DTYPE
def test_pointwise_reuses_registers(dtype: str, isa: str) -> None:
    p = Program(Draw(DTYPES[dtype]), (130, 3))
    a, b = p.input(), p.input((0, 1))
    t = p.op("add", a, b)
    p.op("mul", t, t, into=t)
    u = p.op("sub", t, a)
    p.op("maximum", u, t, into=t)
    p.out(t), p.out(t), p.out(u)
    call = p.call()
    check(call, run(call, dtype, isa))


def arguments(name: str, arity: int, dtype: torch.dtype) -> list[Tensor]:
    """Many magnitudes of both signs, dense around zero, one and the ends of the function's range."""
    draw = Draw(torch.float64)
    spread = torch.cat([draw.flat(2000) * 10.0**e for e in (-8, -3, -1, 0, 1, 2)] + [draw.flat(500) / 1000 + 1])
    if name in ("log", "sqrt", "rsqrt", "pow"):
        spread = spread.abs()
    if name == "log1p":
        spread = torch.where(spread < -1, -1 / spread, spread)
    if name in ("sin", "cos"):
        spread = torch.cat([spread, draw.flat(500) * 3e4])
    rest = [draw.dense(spread.numel()) * 3 for _ in range(arity - 1)]
    return [t.to(dtype) for t in [spread, *rest]]


def apply(name: str, args: list[Tensor], dtype: str, isa: str) -> Tensor:
    n, k = args[0].numel(), len(args)
    op = [_C.pointwise_opcodes().index(name), k, *range(k), *[0] * (3 - k)]
    ints = [1, k, 1, 1, k + 1, n, *[1] * (k + 1), k, 0, *op, 1]
    out = torch.empty(n, dtype=DTYPES[dtype])
    assert MACHINE.run_kernel("pointwise", dtype, isa, [*args, out], ints, []) == 0
    return out


@EACH_ISA
@EACH_DTYPE
@pytest.mark.parametrize("name", [*EXACT, *ROUNDED])
def test_opcode(name: str, dtype: str, isa: str) -> None:
    function, ulps = ROUNDED.get(name, (EXACT.get(name), 0.51))
    args = arguments(name, function_arity(name), DTYPES[dtype])
    got, exact = apply(name, args, dtype, isa).double(), function(*(a.double() for a in args))
    info = torch.finfo(DTYPES[dtype])
    clipped = exact.to(DTYPES[dtype]).double()
    spacing = 2.0 ** (torch.frexp(exact.abs().clamp_min(info.smallest_normal)).exponent - 1).double() * info.eps
    room = (ulps if dtype == "f32" else max(ulps, 4.0)) * spacing
    if name == "fma":  # one rounding or two
        room = (args[0] * args[1]).double().abs() * info.eps + room
    off = torch.where(got == clipped, torch.zeros(()), (got - exact).abs())
    off = torch.where(got.isnan() & exact.isnan(), torch.zeros(()), off)
    worst = int((off / room).argmax())
    assert (off <= room).all(), (
        f"{name}({', '.join(f'{float(a[worst]):.9g}' for a in args)}): expected {exact[worst]:.9g}, "
        f"got {got[worst]:.9g}, {off[worst] / spacing[worst]:.2f} ulp"
    )


def function_arity(name: str) -> int:
    two = ("add", "sub", "mul", "div", "maximum", "minimum", "pow", "gt", "ge", "lt", "le", "eq", "ne")
    return 2 if name in two else 3 if name in ("where", "where_positive", "fma") else 1


@EACH_ISA
@EACH_DTYPE
@pytest.mark.parametrize("name", [*EXACT, *ROUNDED])
def test_opcode_on_special_values(name: str, dtype: str, isa: str) -> None:
    function = ROUNDED[name][0] if name in ROUNDED else EXACT[name]
    info = torch.finfo(DTYPES[dtype])
    special = [
        0.0,
        -0.0,
        torch.inf,
        -torch.inf,
        torch.nan,
        info.max,
        -info.max,
        1.0,
        -1.0,
        90.0,
        -90.0,
        1e-20,
    ]
    if name == "fma":  # with one rounding, max * max - max * max stays finite
        special = [x for x in special if abs(x) != info.max]
    grid = list(itertools.product(special, repeat=function_arity(name)))
    args = [torch.tensor(column, dtype=DTYPES[dtype]) for column in zip(*grid, strict=True)]
    got = apply(name, args, dtype, isa)
    expected = function(*args)
    torch.testing.assert_close(got, expected, rtol=8 * info.eps, atol=info.smallest_normal, equal_nan=True)
    if name not in (
        "maximum",
        "minimum",
        "relu",
        "where",
        "fma",
        "step",
        "softplus",
    ):  # either zero will do there
        zero = (got == 0) & (expected == 0)
        assert torch.equal(got.signbit()[zero], expected.signbit()[zero])


@EACH_ISA
def test_log_softmax_of_extremes(isa: str) -> None:
    rows = [
        [0.0, -torch.inf, 1.0],
        [-torch.inf] * 3,
        [torch.inf, 0.0, 0.0],
        [torch.nan, 0.0, 0.0],
        [1e30, 0.0, -1e30],
    ]
    x = torch.tensor(rows)
    y = torch.empty_like(x)
    assert MACHINE.run_kernel("log_softmax", "f32", isa, [x, y], [5, 3, 1], []) == 0
    torch.testing.assert_close(y, x.log_softmax(1), equal_nan=True)


@EACH_ISA
@pytest.mark.parametrize("shape", [(1, 33, 1), (1, 33, 20)], ids=str)
def test_reduce_max_passes_nan_on(shape: tuple[int, int, int], isa: str) -> None:
    _, n, inner = shape
    x = torch.randn(n, inner)
    x[20, 0] = torch.nan
    y = torch.empty(inner)
    ints = [1, 1, inner, n, 1, inner, 1, 0, 1]
    assert MACHINE.run_kernel("reduce", "f32", isa, [x, y], ints, [1.0]) == 0
    torch.testing.assert_close(y, x.amax(0), equal_nan=True)


# ---- bounds of the op table, where they are hardest to keep --------------------------------------------------------


@EACH_ISA
def test_long_sums_in_lanes(isa: str) -> None:
    """Terms of one sign and size round the same way again and again: one chain would be off by more."""
    lanes, k = 16, 20000
    A = (0.1 * (1 + torch.arange(lanes) / 7)).float().expand(k, lanes).contiguous()
    B, C = torch.ones(k, lanes), torch.empty(lanes)
    ints = [lanes, 1, 1, k, 1, k * lanes, lanes, 1, lanes, lanes, 1, lanes, lanes, 0, 0, 0]
    assert MACHINE.run_kernel("gemm", "f32", isa, [A, B, C], ints, []) == 0
    exact = A.double().sum(0)
    bound = TABLE["matmul_lanes"].errors["lanes"].bound(k, torch.finfo(torch.float32).eps / 2, exact)
    one_chain = torch.from_numpy(A.numpy().cumsum(0)[-1])
    assert ((C.double() - exact).abs() <= bound).all()
    assert ((one_chain.double() - exact).abs() > bound).any()


class Uneven(Draw):
    """Magnitudes over eight decades; or all but one in fifty far below the rest."""

    def __init__(self, kind: str) -> None:
        super().__init__(torch.float32)
        self.kind = kind

    def flat(self, n: int) -> Tensor:
        x, y = (torch.randn(n, generator=self.generator, dtype=torch.float64) for _ in range(2))
        factor = 10 ** (2 * y.clamp(-2, 2)) if self.kind == "decades" else torch.where(y > 2, 1.0, 1e-5)
        return (x * factor).float()


WIDE = [Geometry(2, 14, 14, 64, 64), Geometry(9, 7, 7, 16, 48), Geometry(1, 70, 9, 16, 17, pad=(2, 2))]
FEW = [Geometry(2, 28, 28, 3, 32), Geometry(1, 35, 17, 12, 14), Geometry(2, 24, 9, 13, 40, pad=(2, 2))]


@EACH_ISA
@pytest.mark.parametrize("role", CONVOLUTIONS)
@pytest.mark.parametrize("kind", ["decades", "few"])
@pytest.mark.parametrize("geometry", [*WIDE, *FEW], ids=str)
def test_winograd_on_uneven_entries(geometry: Geometry, kind: str, role: str, isa: str) -> None:
    """What is proved holds whatever the entries."""
    form = "winograd" if geometry in WIDE else "winograd down"
    if geometry.form(role, torch.float32) != form:
        assert role == "conv_dx"  # of few columns and many channels
        return
    call = conv(role, geometry, OIHW, mode=0, form=f"{form}, any entries").make(Uneven(kind))
    check(call, run(call, "f32", isa))


def test_what_the_transforms_of_winograd_make_of_magnitudes() -> None:
    """max_ij Σ_kp |A_pi G_pj B_pk|, of the points ∞, 0, ±0.6875, ±1.5, is the 12.8 that is proved, its square 164."""
    points = torch.tensor([0.0, 0.6875, -0.6875, 1.5, -1.5], dtype=torch.float64)
    others = [points[torch.arange(5) != p] for p in range(5)]
    powers = points[:, None] ** torch.arange(5)
    infinite = torch.zeros(1, 6, dtype=torch.float64)
    infinite[0, -1] = 1
    A = torch.cat([infinite[:, -4:], powers[:, :4]])
    weights = torch.stack([1 / (x - rest).prod() for x, rest in zip(points, others, strict=True)])
    G = torch.cat([infinite[:, -3:], weights[:, None] * powers[:, :3]])

    def vanishing(roots: Tensor) -> Tensor:
        """Coefficients of the product of (x − root), the least power first."""
        made = torch.ones(1, dtype=torch.float64)
        for root in roots:
            made = F.pad(made, (1, 0)) - root * F.pad(made, (0, 1))
        return made

    B = torch.stack([vanishing(points), *(F.pad(vanishing(rest), (0, 1)) for rest in others)])
    exact = torch.einsum("pi,pj,pk->ijk", A, G, B)
    taps = torch.arange(4)[:, None, None] + torch.arange(3)[:, None] == torch.arange(6)
    assert torch.allclose(exact, taps.double())
    most = torch.einsum("pi,pj,pk->ij", A.abs(), G.abs(), B.abs()).max()
    both, down = (TABLE["conv2d"].errors[f"{form}, any entries"] for form in ("winograd", "winograd down"))
    assert most**2 <= both.roundings(288) / (22 + 33) < 1.01 * most**2
    assert most <= down.roundings(27) / (12 + 9) < 1.01 * most


@EACH_ISA
@pytest.mark.parametrize("role", CONVOLUTIONS)
@pytest.mark.parametrize(("form", "shapes"), [("winograd", WIDE), ("winograd down", FEW)])
def test_the_bound_of_winograd_is_of_the_size_of_its_errors(
    form: str, shapes: list[Geometry], role: str, isa: str
) -> None:
    """Over the shapes the greatest error is a quarter of what the row says, or more."""
    used = []
    for geometry in shapes:
        if geometry.form(role, torch.float32) != form:
            continue
        call = conv(role, geometry, OIHW, mode=0, form=form).make(Draw(torch.float32))
        result, got = call.operands[2], run(call, "f32", isa)[2]
        assert result.expected is not None and result.bound is not None
        used.append(float(((got.double() - result.expected).abs() / result.bound).max()))
    assert 0.25 <= max(used) <= 1.0, used


@EACH_ISA
@pytest.mark.parametrize("role", ["conv_fwd", "conv_dx"])
@pytest.mark.parametrize("order", [OIHW, HWIO])
@pytest.mark.parametrize("shape", [(2, 14, 14, 64, 64), (3, 11, 9, 17, 40), (4, 7, 6, 70, 16)])
def test_filters_may_be_transformed_before(
    shape: tuple[int, int, int, int, int], order: str, role: str, isa: str
) -> None:
    """Then a convolution does what it does by itself, to the bit."""
    g, draw = Geometry(*shape), Draw(torch.float32)
    x, y, w = draw.dense(g.N, g.H, g.W, g.C), draw.dense(g.N, *g.out, g.O), weight(draw, g.O, g.C, 3, 3, order)
    adjoint = role == "conv_dx"
    source, out = (y, x) if adjoint else (x, y)
    ints = g.ints(w, 1, 1, 0)
    whole = run(Call(role, [given(source), given(w), anything(out)], ints), "f32", isa)[2]
    columns = (g.O, g.C) if adjoint else (g.C, g.O)
    room = draw.flat(_C.winograd_filter_elements(*columns))
    made = [
        run(Call("winograd_filters", [given(w), anything(room)], [*ints, int(adjoint)]), "f32", isa, parts)[1]
        for parts in (1, 2, 5)
    ]
    assert all(bits_equal(made[0], other) for other in made[1:])
    ints[20] = 2
    call = Call(role, [given(source), given(made[0].clone()), anything(out)], ints)
    assert all(bits_equal(whole, run(call, "f32", isa, parts)[2]) for parts in (1, 3))


def anything(storage: Tensor) -> Operand:
    """An output that is looked at otherwise."""
    return wanted(storage, storage.double(), torch.full(storage.shape, torch.inf, dtype=torch.float64))


def test_every_kernel_has_a_case() -> None:
    """What `winograd_filters` writes hangs on the instruction set: it has a test of its own, above."""
    covered = {case.make(Draw(torch.float64)).kernel for case in CASES}
    assert covered | {"winograd_filters"} == set(_C.kernel_names())
