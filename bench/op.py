"""`python -m bench.op [word ...]`: the native kernels one by one, against the roof of the machine.

Prints GFLOP/s and GB/s on one and on two threads (each thread works on data of its own) and the percentage of the roof
measured in the same run: of a large float32 product where a kernel computes (counted as the direct algorithm, so
Winograd goes above 100 %), of a large copy where it moves. Data that fit into a cache move faster than the copy, so
they go above 100 % too. The answer of every kernel is compared
with its own float64 baseline build before it is timed. Words select rows whose label contains one of them.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from bench import machine, options
from metafast import _C
from metafast.lower.arrays import EXTERNAL

TOLERANCE = 1e-4  # relative L2 distance of float32 from float64


@dataclass(frozen=True)
class Row:
    """One call of a kernel: elements of each float operand, then what makes up the call, and its work.

    `winners` marks the operand that holds positions of maxima, and how many positions there are to choose from.
    """

    label: str
    kernel: str
    elements: tuple[int, ...]
    ints: tuple[int, ...]
    floats: tuple[float, ...] = ()
    flops: int = 0
    winners: tuple[int, int] | None = None

    @property
    def bytes(self) -> int:
        """Bytes of all operands in float32, each counted once."""
        return 4 * sum(self.elements)


@dataclass(frozen=True)
class Result:
    """A row's time for one call on each thread at once, and the rates of all threads together."""

    label: str
    threads: int
    seconds: float
    gflops: float
    gbs: float
    fraction: float


# ---- rows -----------------------------------------------------------------------------------------


def conv_rows() -> Iterator[Row]:
    """The three convolutions at the sizes of conv4 on 28² and 84² images, weights stored (KH, KW, C, O)."""
    sizes = [(75, 14, 64, 64), (5, 14, 64, 64), (75, 28, 1, 64), (75, 7, 64, 64), (75, 3, 64, 64)]
    sizes += [(75, 42, 32, 32), (5, 42, 32, 32), (75, 84, 3, 32)]
    for n, side, c, o in sizes:
        pixels, weights = n * side * side, 9 * c * o
        ints = (n, side, side, c, o, 3, 3, 1, 1, 1, 1, 1, 1, side, side, 1, o, 3 * c * o, c * o, 0, 1, 0)
        flops = 2 * pixels * weights
        name = f"{side}x{side}x{c}->{o} N={n}"
        yield Row(f"conv_fwd {name}", "conv_fwd", (pixels * c, weights, pixels * o), ints, flops=flops)
        yield Row(f"conv_dx  {name}", "conv_dx", (pixels * o, weights, pixels * c), ints, flops=flops)
        yield Row(f"conv_dw  {name}", "conv_dw", (pixels * c, pixels * o, weights), ints, flops=flops)


def gemm_rows() -> Iterator[Row]:
    """Products as linear layers make them: forward (x Wᵀ), backward-data (g W), backward-weight (gᵀ x)."""
    layers = [(10, 1, 40), (10, 40, 40), (10, 40, 1), (10, 10, 100), (5, 64, 5), (75, 64, 5), (80, 784, 256)]
    for rows, n_in, n_out in [*layers, (1024, 1024, 1024)]:
        flops = 2 * rows * n_in * n_out
        x, w, y = rows * n_in, n_in * n_out, rows * n_out
        name = f"{rows}x{n_in}->{n_out}"

        def ints(m: int, n: int, k: int, a: tuple[int, int], b: tuple[int, int]) -> tuple[int, ...]:
            return (1, m, n, k, 0, *a, 0, *b, 0, n, 1, 0, 0, 0)

        forward = ints(rows, n_out, n_in, (n_in, 1), (1, n_in))
        yield Row(f"gemm forward {name}", "gemm", (x, w, y), forward, flops=flops)
        data = ints(rows, n_in, n_out, (n_out, 1), (n_in, 1))
        yield Row(f"gemm data    {name}", "gemm", (y, w, x), data, flops=flops)
        weight = ints(n_out, n_in, rows, (1, n_out), (n_in, 1))
        yield Row(f"gemm weight  {name}", "gemm", (y, x, w), weight, flops=flops)


Operation = tuple[str, int, int] | tuple[str, int, int, int] | tuple[str, int, int, int, int]


def pointwise(
    label: str, dims: tuple[int, ...], strides: Sequence[tuple[int, ...] | None], *operations: Operation
) -> Row:
    """A program with one output, the last operation's register; immediate -1 is 0.1."""
    dense = torch.empty(dims, device="meta").stride()
    laid = [s or dense for s in strides]
    count = [1 + sum((n - 1) * s for n, s in zip(dims, each, strict=True)) for each in [*laid, dense]]
    names = _C.pointwise_opcodes()
    coded = [(names.index(name), *registers, *[0] * (4 - len(registers))) for name, *registers in operations]
    registers = len(strides) + len(operations)
    ints = [len(dims), len(strides), 1, len(operations), registers, *dims]
    ints += (
        [s for each in [*laid, dense] for s in each]
        + [registers - 1, 0]
        + [i for code in coded for i in code]
        + [1]
    )
    name = "x".join(map(str, dims))
    return Row(f"pointwise {label} {name}", "pointwise", tuple(count), tuple(ints), (0.1,))


def pointwise_rows() -> Iterator[Row]:
    """What MLPs and conv nets make of fused pointwise nodes, and single functions."""
    image = (75 * 14 * 14, 64)
    yield pointwise("relu", (10, 40), [None], ("relu", 1, 0))
    yield pointwise("bias, relu", (10, 40), [None, (0, 1)], ("add", 2, 0, 1), ("relu", 3, 2))
    yield pointwise("sgd", (40,), [None, None], ("mul", 2, 1, -1), ("sub", 3, 0, 2))
    yield pointwise("sgd", (40, 40), [None, None], ("mul", 2, 1, -1), ("sub", 3, 0, 2))
    yield pointwise("relu", image, [None], ("relu", 1, 0))
    yield pointwise("affine, relu", image, [None, (0, 1), (0, 1)], ("fma", 3, 0, 1, 2), ("relu", 4, 3))
    yield pointwise("relu backward", image, [None, None], ("step", 2, 0), ("mul", 3, 1, 2))
    for name in ("exp", "log", "tanh", "sigmoid", "erf", "softplus", "sin", "sqrt"):
        yield pointwise(name, (20000,), [None], (name, 1, 0))


def other_rows() -> Iterator[Row]:
    """Reductions, normalisation, softmax, pooling."""
    rows = 75 * 14 * 14
    yield Row("reduce 10x40->40", "reduce", (400, 40), (1, 1, 40, 10, 1, 40, 1, 0, 0), (1.0,))
    yield Row("reduce 10x40->10", "reduce", (400, 10), (1, 1, 10, 40, 40, 1, 1, 0, 0), (1.0,))
    yield Row(f"reduce {rows}x64->64", "reduce", (rows * 64, 64), (1, 1, 64, rows, 1, 64, 1, 0, 0), (1.0,))
    yield Row(f"reduce {rows * 64}->1", "reduce", (rows * 64, 1), (0, 1, rows * 64, 1, 0, 0), (1.0,))
    for name, (outer, n, inner) in {"BatchNorm": (1, rows, 64), "LayerNorm": (512, 512, 1)}.items():
        full, small, shape = outer * n * inner, outer * inner, (outer, n, inner)
        label = f"{name} {outer}x{n}x{inner}"
        yield Row(f"standardize {label}", "standardize", (full, full, *[small] * 3), shape, (1e-5,))
        yield Row(f"project {label}", "project", (full, full, small, full, small), (*shape, 0))
        tangent = (full, full, full, small, small, full)
        yield Row(f"project_tangent {label}", "project_tangent", tangent, (*shape, 0))
    for n, classes in [(75, 5), (512, 1000)]:
        yield Row(f"log_softmax {n}x{classes}", "log_softmax", (n * classes,) * 2, (n, classes, 1))
    out, image = 75 * 7 * 7 * 64, 75 * 14 * 14 * 64
    window = (75, 14, 14, 64, 2, 2, 2, 2, 0, 0, 1, 1, 7, 7)
    yield Row("max_pool 14x14x64", "max_pool", (image, out, out), window, winners=(2, 196))
    moved = (75, 14, 14, 64, 7, 7)
    yield Row("pool_gather 14x14x64", "pool_gather", (image, out, out), moved, winners=(1, 196))
    yield Row("pool_scatter 14x14x64", "pool_scatter", (out, out, image), (*moved, 0), winners=(1, 196))


def all_rows() -> list[Row]:
    """Every row, in the order of printing."""
    return [*conv_rows(), *gemm_rows(), *pointwise_rows(), *other_rows()]


# ---- measuring ------------------------------------------------------------------------------------


def operands(row: Row, dtype: torch.dtype, copies: int = 1) -> list[Tensor]:
    """Random operands (copies, elements), the same for every dtype."""
    draw = torch.Generator().manual_seed(3)
    made: list[Tensor] = []
    for k, n in enumerate(row.elements):
        if row.winners and row.winners[0] == k:
            made.append(torch.randint(row.winners[1], (copies, n), generator=draw, dtype=torch.int32))
        else:
            made.append((torch.rand((copies, n), generator=draw, dtype=torch.float32) + 0.1).to(dtype))
    return made


def check(row: Row) -> None:
    """Compare a call with the float64 baseline build's. Raises RuntimeError where they are apart."""
    single, double = operands(row, torch.float32), operands(row, torch.float64)
    for dtype, isa, held in (("f32", "best", single), ("f64", "baseline", double)):
        pointers = [t.data_ptr() for t in held]
        if status := _C.run_kernel(row.kernel, dtype, isa, pointers, row.ints, row.floats):
            raise RuntimeError(f"{row.label}: status {status}, expected 0")
    for k, (a, b) in enumerate(zip(single, double, strict=True)):
        apart = float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
        if not apart <= TOLERANCE:
            raise RuntimeError(
                f"{row.label}: operand {k} is {apart:.1e} from float64, expected {TOLERANCE:.0e}"
            )


def seconds(row: Row, threads: int, sample: float, rounds: int) -> float:
    """Median seconds of one call, made by every thread at once on data of its own."""
    held = operands(row, torch.float32, threads)
    places = [(EXTERNAL + k, 0) for k in range(len(held))]
    program = _C.Program("f32", {"inner": [(row.kernel, places, row.ints, row.floats)]}, n_external=len(held))
    table = np.array([(t.data_ptr(), t.stride(0) * t.element_size(), 0) for t in held], dtype=np.int64)

    def run(calls: int) -> float:
        start = time.perf_counter()
        _C.run(program, table, threads, calls, threads=threads)
        return (time.perf_counter() - start) / calls

    run(1)
    calls = max(1, math.ceil(sample / max(run(3), 1e-7)))
    return statistics.median(run(calls) for _ in range(rounds))


def roofs(threads: Sequence[int], size: int) -> dict[int, tuple[float, float]]:
    """GFLOP/s of a large product (the fastest of torch's, numpy's and this package's) and GB/s of a large copy."""
    product = Row(
        "", "gemm", (size * size,) * 3, (1, size, size, size, 0, size, 1, 0, size, 1, 0, size, 1, 0, 0, 0)
    )
    found = {}
    for n in threads:
        torch.set_num_threads(n)
        theirs = machine.roof(size)
        ours = n * 2 * size**3 / seconds(product, n, 0.0, 3) / 1e9
        found[n] = (max(theirs["sgemm_gflops"], ours), theirs["copy_gbs"])
    return found


def measure(row: Row, threads: int, roof: tuple[float, float], sample: float, rounds: int) -> Result:
    """Time a row and hold it against the roof: the product's where it computes, else the copy's."""
    took = seconds(row, threads, sample, rounds)
    gflops, gbs = threads * row.flops / took / 1e9, threads * row.bytes / took / 1e9
    fraction = gflops / roof[0] if row.flops else gbs / roof[1]
    return Result(row.label, threads, took, gflops, gbs, fraction)


def line(results: Sequence[Result]) -> str:
    """A row of the table: time and rates for each number of threads."""
    cells = [f"{results[0].label:42}"]
    for r in results:
        rate = f"{r.gflops:7.1f} GFLOP/s" if r.gflops else f"{'':15}"
        cells.append(f"{r.seconds * 1e6:10.2f} µs {rate} {r.gbs:6.1f} GB/s {100 * r.fraction:5.0f} %")
    return " | ".join(cells)


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, time and print the chosen rows."""
    parser = argparse.ArgumentParser(prog="python -m bench.op", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("words", nargs="*", help="only rows whose label contains one of these")
    parser.add_argument("--threads", type=options.positive, nargs="+", default=[1, 2])
    parser.add_argument("--json", type=options.writable, metavar="FILE", help="write the results there")
    parser.add_argument("--quick", action="store_true", help="short samples: does the script still run?")
    given = parser.parse_args(arguments)
    rows = [r for r in all_rows() if not given.words or any(w in r.label for w in given.words)]
    sample, rounds, size = (1e-4, 1, 256) if given.quick else (0.02, 7, 2048)
    roof = roofs(given.threads, size)
    for n, (gflops, gbs) in roof.items():
        print(f"roof, {n} thread{'s' * (n > 1)}: {gflops:.1f} GFLOP/s, {gbs:.1f} GB/s ({_C.isas()[-1]})")
    results = []
    for row in rows:
        check(row)
        results.append([measure(row, n, roof[n], sample, rounds) for n in given.threads])
        print(line(results[-1]), flush=True)
    if given.json:
        held = {"machine": machine.describe(max(given.threads)), "isa": _C.isas()[-1]}
        held["roof"] = {n: {"gflops": r[0], "gbs": r[1]} for n, r in roof.items()}
        held["results"] = [asdict(r) for each in results for r in each]
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    main()
