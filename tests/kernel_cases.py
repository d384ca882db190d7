"""The calls the native kernels are tested with: operands, ints and floats, and what must come out, with its bound.

Every case is a function of a `Draw` and gives a `Call`. Inputs are drawn in the kernel's own dtype, results are
worked out in float64 from those very numbers by PyTorch, and the bounds are those of the op table, or of the headers in
csrc/kernels/cpu.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from metafast import _C
from metafast.ops import TABLE

CHUNK = 128  # sums.hpp: kChunk


@dataclass
class Operand:
    """A flat storage; where it is an output, also what it must hold afterwards and how far each element may be off."""

    storage: Tensor
    expected: Tensor | None = None
    bound: Tensor | None = None


@dataclass
class Call:
    kernel: str
    operands: list[Operand]
    ints: list[int]
    floats: list[float] = field(default_factory=list)
    status: int = 0


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[Draw], Call]

    def __str__(self) -> str:
        return self.name


class Draw:
    """Numbers of one dtype, the same in every run; `u` is the unit roundoff."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.u = torch.finfo(dtype).eps / 2
        self.generator = torch.Generator().manual_seed(11)

    def flat(self, n: int) -> Tensor:
        return torch.randn(n, generator=self.generator, dtype=torch.float64).to(self.dtype)

    def dense(self, *shape: int) -> Tensor:
        return self.flat(math.prod(shape)).view(shape)

    def strided(self, shape: Sequence[int], strides: Sequence[int]) -> Tensor:
        """A view with these strides of a storage of its own (zeros broadcast)."""
        return self.flat(extent(shape, strides)).as_strided(shape, strides)

    def positive(self, *shape: int) -> Tensor:
        return self.dense(*shape).abs() + 0.25


def extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    return 1 + sum(max(n - 1, 0) * s for n, s in zip(shape, strides, strict=True))


def given(view: Tensor) -> Operand:
    return Operand(storage(view))


def storage(view: Tensor) -> Tensor:
    return view.as_strided((view.untyped_storage().nbytes() // view.element_size(),), (1,), 0)


def wanted(view: Tensor, value: Tensor, bound: Tensor | float, add: bool = False) -> Operand:
    """An output that lies like `view` and must become `value` (added to what `view` holds), within `bound`."""
    flat = storage(view)
    expected, room = flat.double().clone(), torch.zeros(flat.shape, dtype=torch.float64)
    at = lambda t: t.as_strided(view.shape, view.stride())  # noqa: E731
    before = view.double() if add else torch.zeros(())
    at(expected).copy_(value + before)
    bound = torch.as_tensor(bound, dtype=torch.float64)
    if add:
        bound = bound + torch.finfo(view.dtype).eps * (value.abs() + before.abs())
    at(room).copy_(bound)
    return Operand(flat, expected, room)


# ---- gemm -----------------------------------------------------------------------------------------

ROW, COLUMN, LOOSE = "row", "column", "loose"


def strides_of(rows: int, columns: int, order: str) -> tuple[int, int]:
    return {ROW: (columns + 3, 1), COLUMN: (1, rows + 2), LOOSE: (3 * columns + 5, 3)}[order]


def gemm(
    batch: int, m: int, n: int, k: int, a: str = ROW, b: str = ROW, c: str = ROW, mode: int = 0, bias: int = 0,
    pair: int = 0,
) -> Case:  # fmt: skip
    def make(draw: Draw) -> Call:
        def matrix(rows: int, columns: int, order: str) -> Tensor:
            rs, cs = strides_of(rows, columns, order)
            return draw.strided((batch, rows, columns), (extent((rows, columns), (rs, cs)) + 1, rs, cs))

        A, B, C = matrix(m, k, a), matrix(k, n, b), matrix(m, n, c)
        x, more = draw.dense(n), [matrix(m, k, a), matrix(k, n, b)] if pair else []
        value, magnitude = product_of(A, B, *more)
        if bias:
            value, magnitude = value + x.double(), magnitude + x.double().abs()
        ints = [batch, m, n, k, *A.stride(), *B.stride(), *C.stride(), mode, bias, pair]
        bound = TABLE["matmul"].errors["direct"].bound((1 + pair) * k, draw.u, magnitude)
        out = wanted(C, value, bound, add=bool(mode))
        return Call("gemm", [given(A), given(B), out, *([given(x)] if bias else []), *map(given, more)], ints)

    return Case(f"gemm {batch}x{m}x{n}x{k} {a}-{b}-{c} mode{mode} bias{bias} pair{pair}", make)


def product_of(*pairs: Tensor) -> tuple[Tensor, Tensor]:
    """A B + A' B' + ... in float64, and the same of absolute values."""
    doubles = [t.double() for t in pairs]
    products = [(a @ b, a.abs() @ b.abs()) for a, b in zip(doubles[::2], doubles[1::2], strict=True)]
    value, magnitude = products[0]
    for more in products[1:]:
        value, magnitude = value + more[0], magnitude + more[1]
    return value, magnitude


def gemm_onto(
    batch: int, m: int, n: int, k: int, a: str = ROW, b: str = ROW, c: str = ROW, sign: int = 1, inside: bool = False,
    pair: int = 0,
) -> Case:  # fmt: skip
    """D + s A B or D - s A B; `inside`: the matrices of the batch side by side."""

    def make(draw: Draw) -> Call:
        def matrix(rows: int, columns: int, order: str) -> Tensor:
            rs, cs = strides_of(rows, columns, order)
            if inside:
                return draw.strided((batch, rows, columns), (1, batch * rs, batch * cs))
            return draw.strided((batch, rows, columns), (extent((rows, columns), (rs, cs)) + 1, rs, cs))

        A, B, C, D, s = matrix(m, k, a), matrix(k, n, b), matrix(m, n, c), matrix(m, n, c), draw.dense(1)
        more = [matrix(m, k, a), matrix(k, n, b)] if pair else []
        product, magnitude = product_of(A, B, *more)
        value = D.double() + sign * s.double() * product
        bound = ((1 + pair) * k + 4) * draw.u * (s.double().abs() * magnitude + D.double().abs())
        ints = [batch, m, n, k, *A.stride(), *B.stride(), *C.stride(), 2 if sign > 0 else 3, 0, pair]
        return Call("gemm", [given(A), given(B), wanted(C, value, bound), given(D), given(s), *map(given, more)], ints)

    return Case(f"gemm {batch}x{m}x{n}x{k} {a}-{b}-{c} onto{sign:+d} inside{inside:d} pair{pair}", make)


def gemm_in_lanes(
    batch: int, m: int, n: int, k: int, shared: str = "", turned: bool = False, mode: int = 0, pair: int = 0
) -> Case:
    """The matrices of the batch side by side in memory; `shared` names an operand that is one for all of them."""

    def make(draw: Draw) -> Call:
        def matrix(name: str, rows: int, columns: int) -> Tensor:
            lane = 0 if name == shared else 1
            rs, cs = (batch, rows * batch + batch) if turned else (columns * batch + batch, batch)
            return draw.strided((batch, rows, columns), (lane, rs, cs))

        A, B, C = matrix("A", m, k), matrix("B", k, n), matrix("C", m, n)
        more = [matrix("A", m, k), matrix("B", k, n)] if pair else []
        value, magnitude = product_of(A, B, *more)
        ints = [batch, m, n, k, *A.stride(), *B.stride(), *C.stride(), mode, 0, pair]
        bound = TABLE["matmul_lanes"].errors["lanes"].bound((1 + pair) * k, draw.u, magnitude)
        out = wanted(C, value, bound, add=bool(mode))
        return Call("gemm", [given(A), given(B), out, *map(given, more)], ints)

    return Case(f"gemm lanes {batch}x{m}x{n}x{k} shared{shared} turned{turned:d} mode{mode} pair{pair}", make)


def gemm_cases() -> Iterator[Case]:
    for batch, shared in itertools.product((2, 4, 8, 16, 32, 24, 6), ("", "A", "B")):
        yield gemm_in_lanes(batch, 10, 40, 13, shared, mode=batch % 3 % 2)
        yield gemm_in_lanes(batch, 7, 3, 5, shared, turned=True)
    for m, n, k in [(1, 1, 1), (1, 40, 10), (40, 1, 10), (25, 2, 4), (3, 3, 500), (13, 11, 193), (12, 4, 0), (0, 4, 4)]:
        yield gemm_in_lanes(16, m, n, k, mode=k % 2)
        yield gemm_in_lanes(16, m, n, k, ("", "A", "B")[k % 3], turned=bool(m % 2), mode=n % 2, pair=1)
    orders = list(itertools.product((ROW, COLUMN, LOOSE), repeat=3))
    for k, (a, b, c) in enumerate(orders):
        yield gemm(1, 13, 37, 19, a, b, c, mode=k % 2, bias=k // 2 % 2)
    small = [
        (10, 40, 40),
        (10, 1, 40),
        (5, 64, 5),
        (1, 1, 1),
        (1, 70, 3),
        (29, 1, 17),
        (17, 48, 33),
        (3, 5, 600),
    ]
    for m, n, k in small:
        for a, b in [(ROW, ROW), (ROW, COLUMN), (COLUMN, ROW)]:
            yield gemm(1, m, n, k, a, b, mode=1)
            yield gemm(1, m, n, k, a, b, mode=n % 2, pair=1)
            yield gemm(1, m, n, k, a, b, COLUMN, bias=1, pair=1)
            yield gemm_onto(1, m, n, k, a, b, sign=-1, pair=1)
            yield gemm(1, m, n, k, a, b, bias=1)
    for m, n in itertools.product((1, 2, 7, 10, 23), (12, 20, 24, 28, 56)):  # half of the last vector or less
        yield gemm(1, m, n, 9, ROW, (ROW, COLUMN)[m % 2], bias=1, pair=m % 2)
        yield gemm_onto(1, m, n, 9, COLUMN, ROW, sign=-1, pair=1 - m % 2)
    for k, (a, b, c) in enumerate(orders):
        yield gemm_onto(1, 13, 37, 19, a, b, c, sign=1 - 2 * (k % 2))
        yield gemm_onto(2, 13, 37, 19, a, b, c, sign=1 - 2 * (k % 2), pair=1)
    for m, n, k in [*small, (256, 100, 5), (70, 80, 530), (4, 5, 0), (0, 4, 4)]:
        yield gemm_onto(1, m, n, k, ROW, COLUMN)
        yield gemm_onto(1, m, n, k, COLUMN, ROW, sign=-1)
        yield gemm_onto(3, m, n, k, ROW, ROW, COLUMN)
    for batch, k in [(16, 13), (24, 193), (6, 9)]:
        yield gemm_onto(batch, 10, 7, k, inside=True, sign=-1)
        yield gemm_onto(batch, 10, 7, k, inside=True, pair=1)
    for m, n, k in [(5, 256, 784), (5, 37, 301), (9, 11, 2000), (1, 6, 5000), (2, 3, 1537), (12, 64, 400), (6, 1, 200)]:
        yield gemm(1, m, n, k, ROW, COLUMN, bias=1)
        yield gemm(1, m, n, k, ROW, COLUMN, COLUMN, mode=1)
        yield gemm_onto(1, m, n, k, ROW, COLUMN)
        yield gemm_onto(1, m, n, k, ROW, COLUMN, pair=1)
    for pair in (0, 1):  # so large that whole rows are written
        yield gemm_onto(1, 151, 517, 5, COLUMN, ROW, sign=-1, pair=pair)
        yield gemm(1, m, n, k, ROW, COLUMN, bias=1, pair=1)
    yield gemm(1, 9, 1, 20, COLUMN, ROW, COLUMN)
    yield gemm(3, 7, 21, 12, ROW, COLUMN)
    yield gemm(4, 7, 21, 12, COLUMN, ROW, mode=1, bias=1)
    yield gemm(1, 80, 256, 784, ROW, COLUMN, bias=1)
    yield gemm(1, 131, 300, 530, COLUMN, ROW, mode=1)
    yield gemm(1, 131, 300, 530, ROW, LOOSE, COLUMN, bias=1)
    for m, n, k in [(0, 4, 4), (4, 0, 4), (4, 5, 0)]:
        yield gemm(1, m, n, k, bias=1)
        yield gemm(1, m, n, k, mode=1)
        yield gemm(1, m, n, k, mode=1, pair=1)
    yield gemm(1, 131, 300, 530, COLUMN, ROW, mode=1, pair=1)
    yield gemm(1, 131, 300, 530, ROW, LOOSE, COLUMN, bias=1, pair=1)


# ---- convolutions ---------------------------------------------------------------------------------

OIHW, HWIO, OHWI, IHWO = "oihw", "hwio", "ohwi", "ihwo"


def weight(draw: Draw, O: int, C: int, KH: int, KW: int, order: str) -> Tensor:  # noqa: E741
    sizes = {"o": O, "i": C, "h": KH, "w": KW}
    dense = draw.dense(*(sizes[d] for d in order))
    return dense.permute([order.index(d) for d in "oihw"])


@dataclass
class Geometry:
    N: int
    H: int
    W: int
    C: int
    O: int  # noqa: E741
    KH: int = 3
    KW: int = 3
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    def __str__(self) -> str:
        s, p, d = (f"{a}{b}" for a, b in (self.stride, self.pad, self.dilation))
        return f"{self.N}x{self.H}x{self.W}x{self.C}-{self.O} k{self.KH}{self.KW} s{s} p{p} d{d}"

    @property
    def out(self) -> tuple[int, int]:
        sides = zip((self.H, self.W), (self.KH, self.KW), self.stride, self.pad, self.dilation, strict=True)
        oh, ow = ((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sides)
        return oh, ow

    def form(self, role: str, dtype: torch.dtype, winograd: int = 1) -> str:
        """The form that the kernel takes."""
        plain = (self.KH, self.KW) == (3, 3) and self.stride == self.dilation == (1, 1)
        if not winograd or dtype != torch.float32 or not plain:
            return "direct"
        (h, w), channels, columns = self.out, self.C, self.O
        if role == "conv_dx":
            h, w, channels, columns = self.H, self.W, columns, channels
        if _C.winograd_pays(h, w, self.N, channels, columns):
            return "winograd"
        return "winograd down" if _C.winograd_down_pays(h, w, self.N, channels, columns) else "direct"

    def forward(self, x: Tensor, w: Tensor) -> Tensor:  # x (N, H, W, C), w (O, C, KH, KW) -> (N, OH, OW, O)
        y = F.conv2d(x.permute(0, 3, 1, 2), w, None, self.stride, self.pad, self.dilation)
        return y.permute(0, 2, 3, 1)

    def ints(self, w: Tensor, mode: int, winograd: int, bias: int) -> list[int]:
        sizes = [self.N, self.H, self.W, self.C, self.O, self.KH, self.KW]
        return [*sizes, *self.stride, *self.pad, *self.dilation, *self.out, *w.stride(), mode, winograd, bias]


def adjoint(function: Callable[[Tensor], Tensor], like: Tensor, along: Tensor) -> Tensor:
    at = torch.zeros(like.shape, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(function(at), at, along)
    return grad


CONVOLUTIONS = {"conv_fwd": "conv2d", "conv_dx": "conv2d_dx", "conv_dw": "conv2d_dw"}  # their rows in the op table


def conv(role: str, g: Geometry, order: str, mode: int, bias: int = 0, winograd: int = 1, form: str = "") -> Case:
    """`form` names the bound of the row that is asserted: unless it is given, that of the form that is taken."""

    def make(draw: Draw) -> Call:
        x, w = draw.dense(g.N, g.H, g.W, g.C), weight(draw, g.O, g.C, g.KH, g.KW, order)
        y, b = draw.dense(g.N, *g.out, g.O), draw.dense(g.O)
        if role == "conv_fwd":
            terms, operands, out = g.KH * g.KW * g.C, [x, w], y
            value = g.forward
        elif role == "conv_dx":
            terms, operands, out = g.KH * g.KW * g.O, [y, w], x
            value = lambda Y, W: adjoint(lambda t: g.forward(t, W), x, Y)  # noqa: E731
        else:
            terms, operands, out = g.N * math.prod(g.out), [x, y], w
            value = lambda X, Y: adjoint(lambda t: g.forward(X, t), w, Y)  # noqa: E731
        first, second = (t.double() for t in operands)
        shift, reach = (b.double(), b.double().abs()) if bias else (0, 0)
        error = TABLE[CONVOLUTIONS[role]].errors[form or g.form(role, draw.dtype, winograd)]
        even = torch.full_like(first, float(first.abs().max())) if error.of == "operands" else first.abs()
        bound = error.bound(terms, draw.u, value(even, second.abs()) + reach)
        result = wanted(out, value(first, second) + shift, bound, add=bool(mode))
        ints = g.ints(w, mode, winograd, bias)
        return Call(role, [*map(given, operands), result, *([given(b)] if bias else [])], ints)

    return Case(f"{role} {g} {order} mode{mode} bias{bias}{'' if winograd else ' direct'}", make)


GEOMETRIES = [
    Geometry(2, 14, 14, 64, 64),
    Geometry(3, 7, 7, 16, 48),
    Geometry(2, 9, 8, 3, 20),
    Geometry(2, 28, 28, 1, 7),
    Geometry(5, 3, 3, 33, 17),
    Geometry(4, 1, 1, 8, 70),
    Geometry(4, 2, 2, 20, 64),
    Geometry(2, 15, 13, 5, 9, stride=(2, 2)),
    Geometry(2, 14, 14, 16, 16, stride=(2, 2), pad=(0, 0)),
    Geometry(2, 12, 11, 4, 6, stride=(3, 2), pad=(2, 1)),
    Geometry(2, 12, 13, 5, 6, pad=(2, 2), dilation=(2, 2)),
    Geometry(1, 17, 16, 3, 4, stride=(2, 3), pad=(3, 2), dilation=(3, 2)),
    Geometry(2, 9, 9, 6, 8, KH=5, KW=1, pad=(2, 0)),
    Geometry(2, 8, 6, 6, 8, KH=2, KW=4, pad=(0, 3)),
    Geometry(2, 6, 7, 24, 40, KH=1, KW=1, pad=(0, 0)),
    Geometry(2, 6, 7, 5, 40, KH=1, KW=1, pad=(0, 0), stride=(3, 3)),
    Geometry(2, 5, 5, 4, 3, KH=1, KW=1, pad=(1, 2)),
    Geometry(1, 4, 4, 3, 2, KH=2, KW=2, pad=(3, 3), stride=(1, 2)),
    Geometry(1, 45, 43, 32, 32),
    Geometry(9, 7, 7, 16, 48),
    Geometry(30, 4, 5, 37, 21, pad=(2, 0)),
    Geometry(3, 16, 15, 20, 70, pad=(0, 0)),
    Geometry(1, 70, 9, 16, 17, pad=(2, 2)),
    Geometry(5, 14, 13, 21, 16, KH=5, KW=5, pad=(2, 1), stride=(2, 2)),  # of which residues meet 3 x 3 taps each
    Geometry(5, 15, 16, 16, 21, KH=7, KW=7, pad=(3, 0), stride=(2, 2)),
    Geometry(5, 15, 16, 16, 16, KH=5, stride=(2, 1)),
    Geometry(5, 16, 15, 16, 16, stride=(2, 2), pad=(2, 2), dilation=(2, 2)),
    Geometry(3, 21, 22, 16, 16, KH=9, KW=7, stride=(3, 3), pad=(0, 2)),
    Geometry(2, 20, 11, 3, 32),
    Geometry(1, 15, 140, 2, 17, pad=(2, 0)),
    Geometry(3, 18, 9, 5, 70, pad=(0, 2)),
    Geometry(2, 16, 13, 13, 48),
    Geometry(1, 23, 21, 40, 3),
    Geometry(0, 4, 4, 2, 3),
]


def rows_that_pieces_share(g: Geometry, taken: str) -> list[tuple[int, slice]]:
    """Image and its rows: all of them, or those of a row of tiles in Winograd's form (of 4, then of 3; of 4 and the
    rest where it goes down alone)."""
    high, tiles = g.out[0], -(-g.out[0] // 4)
    narrow = min(tiles, 4 * tiles - high)
    ends = list(itertools.accumulate([4] * (tiles - narrow) + [3] * narrow)) if taken == "winograd" else [high]
    if taken == "winograd down":
        ends = [min(4 * tile + 4, high) for tile in range(tiles)]
    return [(n, slice(a, b)) for n in range(g.N) for a, b in itertools.pairwise([0, *ends])]


def conv_dw_in_pieces(g: Geometry, pieces: int, mode: int, winograd: int = 1) -> Case:
    """Of shares of the images, or of their rows, one behind the other."""

    def make(draw: Draw) -> Call:
        x, y = draw.dense(g.N, g.H, g.W, g.C), draw.dense(g.N, *g.out, g.O)
        w = weight(draw, g.O, g.C, g.KH, g.KW, OIHW)
        taken = g.form("conv_dw", draw.dtype, winograd)
        error = TABLE["conv2d_dw"].errors[taken]
        X, rows = x.double(), rows_that_pieces_share(g, taken)
        even = torch.full_like(X, float(X.abs().max())) if error.of == "operands" else X.abs()
        values, bounds = [], []
        for piece in range(pieces):
            Y, terms = torch.zeros_like(y, dtype=torch.float64), 0
            for n, some in rows[len(rows) * piece // pieces : len(rows) * (piece + 1) // pieces]:
                Y[n, some] = y[n, some].double()
                terms += Y[n, some, ..., 0].numel()
            values.append(adjoint(lambda t: g.forward(X, t), w, Y))
            of_terms = adjoint(lambda t: g.forward(even, t), w, Y.abs())
            bounds.append(error.bound(max(1, terms), draw.u, of_terms))
        out = wanted(draw.dense(pieces, *w.shape), torch.stack(values), torch.stack(bounds), add=bool(mode))
        return Call("conv_dw", [given(x), given(y), out], g.ints(w, mode, winograd, pieces))

    return Case(f"conv_dw {g} in {pieces} pieces mode{mode}{'' if winograd else ' direct'}", make)


IN_PIECES = [Geometry(3, 14, 14, 33, 20), Geometry(5, 6, 5, 3, 7), Geometry(3, 15, 12, 3, 40)]


def conv_cases() -> Iterator[Case]:
    for k, (g, pieces) in enumerate(itertools.product(IN_PIECES, (2, 3))):
        yield conv_dw_in_pieces(g, pieces, k % 2)
        yield conv_dw_in_pieces(g, pieces, k % 2, winograd=0)
    yield conv_dw_in_pieces(Geometry(2, 6, 6, 5, 4, stride=(2, 1)), 2, 0)

    for k, g in enumerate(GEOMETRIES):
        orders = [OIHW, HWIO, OHWI, IHWO] if k in (1, 7, 10) else [OIHW, HWIO] if k < 4 else [(OIHW, HWIO)[k % 2]]
        for j, order in enumerate(orders):
            yield conv("conv_fwd", g, order, mode=(j + k) % 2, bias=(j + k) // 2 % 2)
            yield conv("conv_dx", g, order, mode=(j + k) % 2)
            yield conv("conv_dw", g, order, mode=(j + k) % 2)
        for role in CONVOLUTIONS:
            if g.form(role, torch.float32) != "direct":
                yield conv(role, g, OIHW, mode=0, winograd=0)


# ---- reductions -----------------------------------------------------------------------------------


def reduce(
    kept: tuple[int, ...], reduced: tuple[int, ...], in_k: tuple[int, ...], in_r: tuple[int, ...],
    out_k: tuple[int, ...] | None = None, mode: int = 0, kind: int = 0, scale: float = 1.0,
) -> Case:  # fmt: skip
    def make(draw: Draw) -> Call:
        x = draw.strided((*kept, *reduced), (*in_k, *in_r))
        axes = tuple(range(len(kept), len(kept) + len(reduced)))
        out_strides = out_k if out_k is not None else torch.empty(kept).stride()
        y = draw.strided(kept, out_strides)
        X = x.double()
        if kind == 0:
            value = X.sum(axes) if axes else X
            n = math.prod(reduced)
            bound = (CHUNK / 4 + math.log2(max(n, 1)) + 5) * draw.u * (X.abs().sum(axes) if axes else X.abs())
        else:
            value, bound = X.amax(axes) if axes else X, 2 * draw.u * X.abs().amax(axes)
        ints = [len(kept), len(reduced), *kept, *reduced, *in_k, *in_r, *out_strides, mode, kind]
        out = wanted(y, scale * value, abs(scale) * bound, add=bool(mode))
        return Call("reduce", [given(x), out], ints, [scale])

    return Case(f"reduce {kept}+{reduced} {in_k}{in_r}->{out_k} mode{mode} kind{kind} scale{scale}", make)


def reduce_cases() -> Iterator[Case]:
    for kind, mode in itertools.product((0, 1), (0, 1)):
        yield reduce((40,), (10,), (1,), (40,), mode=mode, kind=kind)
        yield reduce((10,), (37,), (37,), (1,), mode=mode, kind=kind)
        yield reduce((5,), (1000,), (1,), (5,), mode=mode, kind=kind)
        yield reduce((), (1013,), (), (1,), mode=mode, kind=kind)
        yield reduce((3, 20), (5, 7), (700, 1), (140, 20), mode=mode, kind=kind)
        yield reduce((3, 20), (5, 7), (700, 35), (7, 1), (1, 3), mode=mode, kind=kind)
        yield reduce((6, 3), (4,), (1, 24), (6,), (3, 1), mode=mode, kind=kind)
        yield reduce((9,), (11,), (33,), (3,), (2,), mode=mode, kind=kind)
        yield reduce((50,), (6,), (3,), (200,), (2,), mode=mode, kind=kind)
        yield reduce((4, 3), (2, 5, 3), (1, 120), (60, 12, 4), mode=mode, kind=kind)
        yield reduce((4,), (6,), (0,), (1,), mode=mode, kind=kind)
    yield reduce((64,), (3000,), (1,), (64,), scale=0.125)
    yield reduce((2,), (5000,), (5000,), (1,), scale=-3.0, mode=1)
    yield reduce((8, 8), (), (8, 1), (), scale=2.0, mode=1)
    yield reduce((4,), (0,), (1,), (4,), mode=0)
    yield reduce((0,), (4,), (1,), (1,), mode=0)


# ---- normalisation and softmax --------------------------------------------------------------------

MIDDLE = [(1, 75, 64), (1, 300, 5), (2, 33, 20), (7, 40, 1), (3, 5, 1), (4, 1000, 1), (2, 3, 17), (1, 1, 3)]
MIDDLE += [(3, 200, 2)]


def sum_factor(n: int) -> float:
    return CHUNK / 4 + math.log2(n) + 8


def standardize(shape: tuple[int, int, int], eps: float = 1e-5, mean_of: float = 3.0) -> Case:
    """Columns are read less a value near their mean: however far that is from 0, it costs the variance no digits."""

    def make(draw: Draw) -> Call:
        outer, n, inner = shape
        x = draw.dense(*shape) + mean_of
        X, f = x.double(), sum_factor(n) * draw.u
        near = X - mean_of  # exact, so that the reference does not lose the digits that are asked for
        mean, var = mean_of + near.mean(1), near.var(1, unbiased=False)
        rstd = (var + eps).rsqrt()
        added = X if inner == 1 else near
        off_mean = f * added.abs().mean(1) + 2 * draw.u * mean.abs()
        off_var = 4 * f * var + (off_mean**2 if inner == 1 else 0.0)
        off_rstd = 4 * draw.u * rstd + rstd**3 * off_var
        xhat = (near - near.mean(1, keepdim=True)) * rstd[:, None]
        off = xhat.abs() * 8 * draw.u + (off_mean * rstd)[:, None] + (X - mean[:, None]).abs() * off_rstd[:, None]
        off = off + 4 * draw.u * X.abs() * rstd[:, None]
        blank, small = draw.dense(*shape), lambda: draw.dense(outer, inner)
        outs = [wanted(blank, xhat, off), wanted(small(), rstd, off_rstd)]
        outs += [wanted(small(), mean, off_mean + 1e-300), wanted(small(), var, off_var)]
        return Call("standardize", [given(x), *outs], list(shape), [eps])

    return Case(f"standardize {shape} about {mean_of}", make)


def moments(shape: tuple[int, int, int], mean_of: float = 3.0) -> Case:
    """The statistics of standardize, with its bounds."""

    def make(draw: Draw) -> Call:
        x, _, _, mean, var = standardize(shape, mean_of=mean_of).make(draw).operands
        return Call("moments", [x, mean, var], list(shape))

    return Case(f"moments {shape} about {mean_of}", make)


def join_moments(shape: tuple[int, int, int], eps: float = 1e-5, mean_of: float = 3.0) -> Case:
    """Of pieces whose means lie apart: their own spread is a part of the variance."""

    def make(draw: Draw) -> Call:
        outer, n, inner = shape
        means, inside = draw.dense(*shape) + mean_of, draw.dense(*shape).square()
        near, within, f = means.double() - mean_of, inside.double(), sum_factor(n) * draw.u
        mean, var = mean_of + near.mean(1), near.var(1, unbiased=False) + within.mean(1)
        rstd = (var + eps).rsqrt()
        added = near + mean_of if inner == 1 else near
        off_mean = f * added.abs().mean(1) + 2 * draw.u * mean.abs()
        off_var = 4 * f * var + (off_mean**2 if inner == 1 else 0.0)
        off_rstd = 4 * draw.u * rstd + rstd**3 * off_var
        results = [(rstd, off_rstd), (mean, off_mean + 1e-300), (var, off_var)]
        outs = [wanted(draw.dense(outer, inner), value, off) for value, off in results]
        return Call("join_moments", [given(means), given(inside), *outs], list(shape), [eps])

    return Case(f"join_moments {shape} about {mean_of}", make)


def projected(v: Tensor, xhat: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    corr = (v * xhat).mean(1, keepdim=True)
    return rstd * (v - v.mean(1, keepdim=True) - xhat * corr), corr


def project(shape: tuple[int, int, int], mode: int) -> Case:
    def make(draw: Draw) -> Call:
        outer, n, inner = shape
        v, xhat, rstd = draw.dense(*shape), draw.dense(*shape), draw.positive(outer, 1, inner)
        V, X, R = v.double(), xhat.double(), rstd.double()
        value, corr = projected(V, X, R)
        f = sum_factor(n) * draw.u
        off_corr = f * (V * X).abs().mean(1, keepdim=True)
        mean = V.abs().mean(1, keepdim=True)
        off = R * (f * mean + X.abs() * off_corr + 6 * draw.u * (V.abs() + mean + (X * corr).abs()))
        outs = [wanted(draw.dense(*shape), value, off, add=bool(mode))]
        outs += [wanted(draw.dense(outer, 1, inner), corr, off_corr)]
        return Call("project", [given(v), given(xhat), given(rstd), *outs], [*shape, mode])

    return Case(f"project {shape} mode{mode}", make)


def project_tangent(shape: tuple[int, int, int], mode: int) -> Case:
    def make(draw: Draw) -> Call:
        outer, n, inner = shape
        v, xhat, dot = draw.dense(*shape), draw.dense(*shape), draw.dense(*shape)
        rstd, corr_dot = draw.positive(outer, 1, inner), draw.dense(outer, 1, inner)
        V, X, D, R, S = (t.double() for t in (v, xhat, dot, rstd, corr_dot))
        p, corr = projected(V, X, R)
        cross = (V * D).mean(1, keepdim=True)
        value = -R * S * p - R * (D * corr + X * cross)
        A = V.abs().mean(1, keepdim=True) + V.abs()
        B, C = (V * X).abs().mean(1, keepdim=True), (V * D).abs().mean(1, keepdim=True)
        magnitude = R * S.abs() * R * (A + X.abs() * B) + R * (D.abs() * B + X.abs() * C)
        out = wanted(draw.dense(*shape), value, (sum_factor(n) + 8) * draw.u * magnitude, add=bool(mode))
        operands = [given(t) for t in (v, xhat, dot, rstd, corr_dot)]
        return Call("project_tangent", [*operands, out], [*shape, mode])

    return Case(f"project_tangent {shape} mode{mode}", make)


def log_softmax(shape: tuple[int, int, int]) -> Case:
    def make(draw: Draw) -> Call:
        x = 4 * draw.dense(*shape)
        X = x.double()
        value = X.log_softmax(1)
        spread = X.amax(1, keepdim=True) - X
        bound = 8 * draw.u * (1 + value.abs() + spread) + sum_factor(shape[1]) * draw.u
        return Call("log_softmax", [given(x), wanted(draw.dense(*shape), value, bound)], list(shape))

    return Case(f"log_softmax {shape}", make)


def cumsum(shape: tuple[int, int, int], reverse: int) -> Case:
    def make(draw: Draw) -> Call:
        x = draw.dense(*shape)
        X = x.double().flip(1) if reverse else x.double()
        value, magnitude = X.cumsum(1), X.abs().cumsum(1)
        bound = draw.u * value.abs() + 2.0**-53 * shape[1] * magnitude
        if reverse:
            value, bound = value.flip(1), bound.flip(1)
        return Call("cumsum", [given(x), wanted(draw.dense(*shape), value, bound)], [*shape, reverse])

    return Case(f"cumsum {shape} reverse{reverse}", make)


def middle_cases() -> Iterator[Case]:
    for k, shape in enumerate(MIDDLE):
        yield standardize(shape)
        yield moments(shape)
        yield join_moments(shape)
        yield project(shape, k % 2)
        yield project_tangent(shape, (k + 1) % 2)
        yield log_softmax(shape)
        yield cumsum(shape, k % 2)
    for shape in [(1, 300, 5), (2, 1000, 33), (1, 75, 64), (3, 700, 1)]:
        yield standardize(shape, mean_of=1000.0)
        yield moments(shape, mean_of=1000.0)
        yield join_moments(shape, mean_of=1000.0)
    for shape in [(75, 5, 1), (17, 1, 1), (16, 64, 1), (3, 65, 1), (2, 5, 33)]:
        yield log_softmax(shape)


# ---- pooling --------------------------------------------------------------------------------------

Pair = tuple[int, int]


def pool_shape(n: int, c: int, side: Pair, k: Pair, s: Pair, p: Pair, d: Pair = (1, 1)) -> list[int]:
    h, w = ((a + 2 * b - e * (q - 1) - 1) // t + 1 for a, b, q, t, e in zip(side, p, k, s, d, strict=True))
    return [n, *side, c, *k, *s, *p, *d, h, w]


def max_pool(
    n: int, c: int, side: Pair, k: Pair, s: Pair, p: Pair = (0, 0), d: Pair = (1, 1), nan: int = 0, signs: bool = False
) -> Case:
    def make(draw: Draw) -> Call:
        x = draw.dense(n, *side, c).mul(4).round()  # ties are common
        if nan:
            x.view(-1)[::nan] = float("nan")
        sign = (torch.arange(c) % 3 - 1).to(x)  # -1, 0, 1: the least, the first, the largest wins
        ints = [*pool_shape(n, c, side, k, s, p, d), int(signs)]
        channels_first = (x * sign if signs else x).permute(0, 3, 1, 2)
        idx = F.max_pool2d(channels_first, k, s, p, d, return_indices=True)[1]
        y = x.permute(0, 3, 1, 2).flatten(2).gather(2, idx.flatten(2)).reshape(idx.shape)
        y, idx = y.permute(0, 2, 3, 1), idx.permute(0, 2, 3, 1)
        outs = [wanted(draw.dense(*y.shape), y.double(), 0.0)]
        outs += [wanted(torch.zeros(idx.shape, dtype=torch.int32) - 7, idx.double(), 0.0)]
        return Call("max_pool", [given(x), *outs, *([given(sign)] if signs else [])], ints)

    return Case(f"max_pool {n}x{side}x{c} k{k} s{s} p{p} d{d} nan{nan} signs{signs}", make)


def winners(draw: Draw, n: int, c: int, side: Pair, out: Pair, window: str) -> Tensor:
    """(n, places, c): anywhere; or of windows that are 2 x 2 at stride 2, but for one ("stray") or but for all."""
    if window == "any":
        return torch.randint(0, side[0] * side[1], (n, out[0] * out[1], c), generator=draw.generator)
    k, p = (3, 1) if window == "3x3" else (2, 0)
    x = torch.randn(n, c, *side, generator=draw.generator)
    idx = F.max_pool2d(x, k, 2, p, return_indices=True)[1].flatten(2).mT.contiguous()
    assert idx.shape[1] == out[0] * out[1]
    if window == "stray":
        idx[-1, -1, -1] = 0
    return idx


def pool_move(role: str, n: int, c: int, side: Pair, out: Pair, mode: int = 0, window: str = "any") -> Case:
    def make(draw: Draw) -> Call:
        h, w = side
        dense, small = draw.dense(n, h * w, c), draw.dense(n, out[0] * out[1], c)
        idx = winners(draw, n, c, side, out, window)
        ints = [n, h, w, c, *out]
        where = given(idx.to(torch.int32))
        if role == "pool_gather":
            value = dense.double().gather(1, idx)
            return Call(role, [given(dense), where, wanted(small, value, 0.0)], ints)
        zero = torch.zeros(dense.shape, dtype=torch.float64)
        value = zero.scatter_add(1, idx, small.double())
        bound = 8 * draw.u * (zero.scatter_add(1, idx, small.double().abs()) + (dense.double().abs() if mode else 0))
        return Call(role, [given(small), where, wanted(dense, value, bound, add=bool(mode))], [*ints, mode])

    return Case(f"{role} {n}x{side}x{c} from {out} {window} mode{mode}", make)


def avg_pool(
    role: str, n: int, c: int, side: Pair, k: Pair, s: Pair, p: Pair, include: int, divisor: int, mode: int
) -> Case:
    def make(draw: Draw) -> Call:
        shape = pool_shape(n, c, side, k, s, p)
        out = shape[-2:]
        ints = [*shape[:10], *out, include, divisor, mode]
        x, y = draw.dense(n, *side, c), draw.dense(n, *out, c)

        def forward(t: Tensor) -> Tensor:
            pooled = F.avg_pool2d(t.permute(0, 3, 1, 2), k, s, p, False, bool(include), divisor or None)
            return pooled.permute(0, 2, 3, 1)

        X, Y = x.double(), y.double()
        if role == "avg_pool":
            given_, out_, value, magnitude = x, y, forward(X), forward(X.abs())
        else:
            given_, out_, value, magnitude = y, x, adjoint(forward, X, Y), adjoint(forward, X, Y.abs())
        bound = (k[0] * k[1] + 2) * draw.u * (magnitude + (out_.double().abs() if mode else 0))
        return Call(role, [given(given_), wanted(out_, value, bound, add=bool(mode))], ints)

    return Case(f"{role} {n}x{side}x{c} k{k} s{s} p{p} include{include} divisor{divisor} mode{mode}", make)


def pool_cases() -> Iterator[Case]:
    yield max_pool(2, 64, (14, 14), (2, 2), (2, 2))
    yield max_pool(2, 5, (7, 9), (2, 2), (2, 2))
    yield max_pool(2, 21, (7, 9), (2, 2), (3, 1))
    yield max_pool(2, 5, (7, 9), (2, 2), (2, 2), (1, 1))
    yield max_pool(2, 5, (6, 8), (2, 2), (2, 2), d=(2, 3))
    yield max_pool(3, 21, (8, 7), (3, 3), (2, 1), (1, 1))
    yield max_pool(2, 17, (9, 9), (3, 2), (1, 2), (1, 1), (2, 3))
    yield max_pool(2, 17, (9, 9), (2, 2), (2, 2), nan=7)
    yield max_pool(1, 1, (4, 4), (4, 4), (4, 4))
    yield max_pool(2, 64, (14, 14), (2, 2), (2, 2), signs=True)
    yield max_pool(2, 5, (7, 9), (2, 2), (2, 2), nan=7, signs=True)
    yield max_pool(3, 21, (8, 7), (3, 3), (2, 1), (1, 1), signs=True)
    for role in ("pool_gather", "pool_scatter"):
        yield pool_move(role, 3, 64, (14, 14), (7, 7))
        yield pool_move(role, 2, 5, (5, 7), (3, 2))
        for c, side, window in itertools.product((1, 5, 21, 64), ((8, 6), (7, 9), (2, 3)), ("2x2", "stray")):
            yield pool_move(role, 3, c, side, (side[0] // 2, side[1] // 2), window=window)
        yield pool_move(role, 3, 21, (8, 6), (4, 3), window="3x3")
    yield pool_move("pool_scatter", 2, 21, (6, 6), (5, 5), mode=1)
    yield pool_move("pool_scatter", 2, 21, (6, 7), (3, 3), mode=1, window="2x2")
    for role in ("avg_pool", "avg_pool_adj"):
        yield avg_pool(role, 2, 64, (6, 6), (6, 6), (1, 1), (0, 0), 1, 0, 0)
        yield avg_pool(role, 2, 5, (7, 9), (2, 3), (2, 2), (1, 1), 1, 0, 1)
        yield avg_pool(role, 2, 19, (7, 9), (3, 3), (1, 2), (1, 1), 0, 0, 0)
        yield avg_pool(role, 2, 19, (8, 8), (3, 3), (2, 2), (1, 0), 0, 7, 1)


# ---- one_hot, fill --------------------------------------------------------------------------------


def one_hot(
    labels: Sequence[float], classes: int, ignore: int, stride: int, status: int = 0, real: int = 0, wraps: int = 0
) -> Case:
    def make(draw: Draw) -> Call:
        dtype = draw.dtype if real else torch.int64
        y = torch.full(((len(labels) - 1) * stride + 1,), 10**12, dtype=dtype)
        y[::stride] = torch.tensor(labels, dtype=dtype)
        value = torch.zeros(len(labels), classes, dtype=torch.float64)
        for row, label in enumerate(labels):
            place = label + classes if wraps and label < 0 else label
            if label != ignore and 0 <= place < classes:
                value[row, int(place)] = 1
        out = wanted(draw.dense(len(labels), classes), value, 0.0)
        ints = [len(labels), classes, ignore, stride, real, wraps]
        return Call("one_hot", [given(y), out], ints, status=status)

    return Case(f"one_hot {labels} of {classes} stride{stride}{' real' * real}{' wraps' * wraps}", make)


def fill(n: int, value: float) -> Case:
    def make(draw: Draw) -> Call:
        exact = torch.full((n,), value, dtype=torch.float64).to(draw.dtype).double()
        return Call("fill", [wanted(draw.dense(n), exact, 0.0)], [n], [value])

    return Case(f"fill {n} {value}", make)


def small_cases() -> Iterator[Case]:
    yield one_hot([0, 4, 2, 2], 5, -100, 1)
    yield one_hot([0, -100, 2], 3, -100, 2)
    yield one_hot([1, 3], 3, -100, 1, status=1)
    yield one_hot([-1, 0], 3, -100, 1, status=1)
    yield one_hot([0, -100, 2, 1], 3, -100, 2, real=1)
    for wrong in (3, -1, 1e12, float("inf"), float("nan")):
        yield one_hot([1, wrong], 3, -100, 1, status=1, real=1)
    for real in (0, 1):
        yield one_hot([-1, 2, -3, -100], 3, -100, 2, real=real, wraps=1)
        for wrong in (3, -4):
            yield one_hot([1, wrong], 3, -100, 1, status=1, real=real, wraps=1)
    yield fill(1, 0.0)
    yield fill(197, -0.1)
