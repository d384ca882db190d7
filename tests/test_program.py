"""The replay of hand-written programs: order of sections, spaces, groups, threads, failures, forks, memory."""

import ast
import importlib.resources
import itertools
import math
import multiprocessing
import os
import re
import threading

import numpy as np
import pytest
import torch

from metafast import _C

ARENA, STATE, STATE_NEXT, ADJOINT, ADJOINT_NEXT, ACCUMULATOR, CONSTANT, CALL, CHUNK, EXTERNAL = range(10)
OPCODE = {name: n for n, name in enumerate(_C.pointwise_opcodes())}
DTYPES = {"f32": np.float32, "f64": np.float64}


def pointwise(operands, ops, dims=(1,), add=False, floats=()):
    """Dense operands, the last one the output; ops are (name, dst, a, b, c), the last one's register is written."""
    rank, n_in = len(dims), len(operands) - 1
    strides = [math.prod(dims[d + 1 :]) for d in range(rank)]
    rows = [[OPCODE[name], *(*registers, 0, 0)[:4]] for name, *registers in ops]
    last = rows[-1][1]
    counts = [rank, n_in, 1, len(rows), max(n_in - 1, *(row[1] for row in rows)) + 1]
    ints = [*counts, *dims, *strides * len(operands), last, int(add), *itertools.chain(*rows), 1]
    return ("pointwise", operands, ints, list(floats))


def copy(source, target, **options):
    return pointwise([source, target], [("copy", 1, 0)], **options)


def multiply(a, b, target, **options):
    return pointwise([a, b, target], [("mul", 2, 0, 1)], **options)


def fill(target, count, value):
    return ("fill", [target], [count], [value])


def gemm(a, b, c, m, n, k, add=False):
    return ("gemm", [a, b, c], [1, m, n, k, 0, k, 1, 0, n, 1, 0, n, 1, int(add), 0, 0], [])


class Externals(np.ndarray):
    """A table that keeps what it points to."""


def external(*arrays):
    """Rows of `run`'s externals from (array, task axis stride in bytes, step axis stride in bytes)."""
    rows = [(array.ctypes.data, task, step) for array, task, step in arrays]
    table = np.array(rows, np.int64).reshape(-1, 3).view(Externals)
    table.kept = arrays
    return table


def done(outcome):
    assert outcome == (0, -1, -1, "", -1)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_sections_run_in_order(steps):
    """Each section appends its digit to a number in the arena; the epilogue hands it out."""

    def append(digit):
        return pointwise([(ARENA, 0), (ARENA, 0)], [("fma", 1, 0, -1, -2)], floats=[10.0, float(digit)])

    program = _C.Program(
        "f64",
        {
            "prologue": [fill((ARENA, 0), 1, 1.0)],
            "inner": [append(2)],
            "query": [append(3)],
            "meta": [append(4)],
            "epilogue": [append(5), copy((ARENA, 0), (EXTERNAL, 0))],
        },
        arena_bytes=8,
        n_external=1,
    )
    out = np.zeros(3)
    done(_C.run(program, external((out, 8, 0)), T=3, steps=steps))
    assert [str(int(x)) for x in out] == ["1" + "2" * steps + "3" + "4" * steps + "5"] * 3


def power_program(dtype):
    """Σ_t w_t s_t x^K with its derivatives: state s·x^k, accumulators (d/dx, d/ds)."""
    size = np.dtype(DTYPES[dtype]).itemsize
    s, x = (EXTERNAL, 0), (EXTERNAL + 1, 0)
    return _C.Program(
        dtype,
        {
            "prologue": [copy(s, (STATE, 0))],
            "inner": [multiply((STATE, 0), x, (STATE_NEXT, 0))],
            "query": [copy((STATE, 0), (EXTERNAL + 2, 0)), copy((CALL, 2 * size), (ADJOINT, 0))],
            "meta": [
                multiply((ADJOINT, 0), (STATE, 0), (ACCUMULATOR, 0), add=True),
                multiply((ADJOINT, 0), x, (ADJOINT_NEXT, 0)),
            ],
            "epilogue": [copy((ADJOINT, 0), (ACCUMULATOR, size), add=True)],
        },
        state_bytes=size,
        adjoint_bytes=size,
        accumulator_bytes=2 * size,
        n_external=3,
    )


@pytest.mark.parametrize("spoil", ["", "query", "meta", "prologue"])
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_first_state_that_tasks_share(steps, threads, spoil):
    """What a worker does once for its tasks, it does for each where something else writes to their first state."""
    tasks, out, again = 40, np.zeros(40), np.zeros(40)
    double = pointwise([(STATE, 0), (STATE, 0)], [("add", 1, 0, 0)])
    sections = {
        "prologue": [copy((EXTERNAL, 0), (STATE, 0))],
        "inner": [multiply((STATE, 0), (EXTERNAL + 1, 0), (STATE_NEXT, 0))],
        "query": [copy((STATE, 0), (EXTERNAL + 2, 0)), fill((ADJOINT, 0), 1, 1.0)],
        "meta": [multiply((ADJOINT, 0), (EXTERNAL + 1, 0), (ADJOINT_NEXT, 0))],
        "epilogue": [multiply((ADJOINT, 0), (STATE, 0), (EXTERNAL + 3, 0))],
    }
    if spoil:
        sections[spoil].append(double)
    program = _C.Program("f64", sections, state_bytes=8, adjoint_bytes=8, n_external=4)
    s, x = np.array([1.25]), np.linspace(0.5, 1.5, tasks)
    done(_C.run(program, external((s, 0, 0), (x, 8, 0), (out, 8, 0), (again, 8, 0)), tasks, steps, threads=threads))
    first = s * (2 if spoil == "prologue" else 1)
    np.testing.assert_allclose(out, first * x**steps, rtol=1e-14)
    spoiled = 2 if (spoil == "meta" and steps) or (spoil == "query" and not steps) else 1
    np.testing.assert_allclose(again, first * spoiled * x**steps, rtol=1e-14)


def product_program(dtype, m, n, k, spoil=False):
    """x·Wᵀ at each step, W an external; with `spoil` the query then doubles W."""
    product = ("gemm", [(EXTERNAL, 0), (EXTERNAL + 1, 0), (EXTERNAL + 2, 0)],
               [1, m, n, k, 0, k, 1, 0, 1, k, 0, n, 1, 0, 0, 0], [])  # fmt: skip
    w = (EXTERNAL + 1, 0)
    double = pointwise([w, w], [("add", 1, 0, 0)], dims=(n * k,))
    return _C.Program(dtype, {"inner": [product], "query": [double] if spoil else []}, n_external=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("own", ["", "task", "step"])
@pytest.mark.parametrize("sizes", [(7, 5, 4), (75, 40, 200), (20, 130, 33)])
def test_a_factor_that_tasks_share(sizes, own, threads, dtype):
    """A worker packs it once in a call, where it is the same for all tasks and steps, and anew in the next call."""
    (m, n, k), tasks, steps = sizes, 5, 2
    rng = np.random.default_rng(0)
    x = rng.standard_normal((tasks, steps, m, k)).astype(DTYPES[dtype])
    w = rng.standard_normal({"": (1, 1), "task": (tasks, 1), "step": (1, steps)}[own] + (n, k)).astype(x.dtype)
    out = np.zeros((tasks, steps, m, n), x.dtype)
    strides = (w.strides[0] if own == "task" else 0, w.strides[1] if own == "step" else 0)
    externals = external((x, *x.strides[:2]), (w, *strides), (out, *out.strides[:2]))
    program = product_program(dtype, *sizes)
    for _ in range(2):
        done(_C.run(program, externals, tasks, steps, threads=threads))
        expected = x.astype(np.float64) @ w.astype(np.float64).swapaxes(-1, -2)
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-4 if dtype == "f32" else 1e-12)
        w += 1


def test_what_is_kept_is_kept_once_and_has_a_bound():
    def product(at, n, k):
        b = (EXTERNAL + 1, at)
        return ("gemm", [(EXTERNAL, 0), b, (ARENA, 0)], [1, 64, n, k, 0, k, 1, 0, 1, k, 0, n, 1, 0, 0, 0], [])

    def kept(*products):
        return _C.Program("f32", {"query": list(products)}, arena_bytes=1 << 20, n_external=2).kept_bytes()

    small, other = product(0, 64, 100), product(4, 64, 100)
    assert kept(small) == kept(*[small] * 3) == 4 * 64 * 100
    assert kept(small, other) == 2 * kept(small)  # another place
    assert kept(small, product(0, 100, 64)) == kept(small) + kept(product(0, 100, 64))  # another form
    large = [product(4 * k, 1024, 512) for k in range(100)]
    assert kept(*large) == 2 * kept(large[0]) == 4 << 20


def test_a_factor_that_the_program_writes_is_not_kept():
    sizes, tasks = (6, 20, 30), 3
    x, w = np.ones((tasks, 6, 30)), np.ones((20, 30))
    out = np.zeros((tasks, 6, 20))
    program = product_program("f64", *sizes, spoil=True)
    table = [(x, x.strides[0], 0), (w, 0, 0), (out, out.strides[0], 0)]
    with pytest.raises(ValueError, match="every task writes to the same place"):
        _C.run(program, external(*table), tasks, 1)
    for t in range(tasks):
        done(_C.run(program, external(*[(a[t : t + 1] if a is not w else w, 0, 0) for a, *_ in table]), 1, 1))
    np.testing.assert_array_equal(out[:, 0, 0], [30, 60, 120])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_states_adjoints_and_weights(dtype, threads):
    tasks, steps = 21, 4
    rng = np.random.default_rng(0)
    s, x, weights = rng.uniform(0.5, 1.5, (3, tasks)).astype(DTYPES[dtype])
    x = x[:1]
    size, out, result = s.itemsize, np.zeros_like(s), np.zeros(2, s.dtype)
    externals = external((s, size, 0), (x, 0, 0), (out, size, 0))
    done(
        _C.run(
            power_program(dtype), externals, tasks, steps,
            weights_ptr=weights.ctypes.data, result_ptr=result.ctypes.data, threads=threads,
        )
    )  # fmt: skip
    tolerance = 1e-6 if dtype == "f32" else 1e-14
    np.testing.assert_allclose(out, s * x**steps, rtol=tolerance)
    np.testing.assert_allclose(
        result, [(weights * s).sum() * steps * x[0] ** (steps - 1), weights.sum() * x[0] ** steps], rtol=tolerance
    )


@pytest.mark.parametrize("every", range(1, 11))
@pytest.mark.parametrize("threads", [1, 2])
def test_states_held_of_every_nth_step(every, threads):
    """The same bits, also of tasks that make fewer steps."""
    tasks, steps = 21, 10
    s, x = np.random.default_rng(0).uniform(0.5, 1.5, (2, tasks))
    steps_of = np.arange(tasks, dtype=np.int64) % (steps + 1)

    def run(every):
        out, result = np.zeros(tasks), np.zeros(2)
        externals = external((s, 8, 0), (x, 0, 0), (out, 8, 0))
        pointers = dict(steps_ptr=steps_of.ctypes.data, result_ptr=result.ctypes.data)
        done(_C.run(power_program("f64"), externals, tasks, steps, **pointers, threads=threads, every=every))
        return [*out, *result]

    assert run(every) == run(1)
    np.testing.assert_allclose(run(every)[:tasks], s * x[0] ** steps_of, rtol=1e-14)


@pytest.mark.parametrize("every", [1, 3, 4, 5, 10])
def test_inner_runs_again_within_segments(every):
    """The sections in the order in which they run, as digits of a number that float64 just holds."""
    steps, digits = 10, {"inner": 1, "query": 2, "meta": 3}
    append = {name: pointwise([(ARENA, 0), (ARENA, 0)], [("fma", 1, 0, -1, -2)], floats=[4.0, float(d)])
              for name, d in digits.items()}  # fmt: skip
    sections = {"prologue": [fill((ARENA, 0), 1, 0.0)], **{name: [row] for name, row in append.items()}}
    hand_out = [copy((ARENA, 0), (EXTERNAL, 0))]
    program = _C.Program("f64", {**sections, "epilogue": hand_out}, arena_bytes=8, n_external=1)
    out = np.zeros(1)
    done(_C.run(program, external((out, 8, 0)), 1, steps, every=every))
    order = "1" * steps + "2"
    for start in reversed(range(0, steps, every)):
        end = min(start + every, steps)
        order += "1" * (end - start - 1 if end < steps else 0) + "3" * (end - start)
    assert int(out[0]) == int(order, 4) < 2**53


def record_program():
    """Hands out the record of the call: one row (k, K, weight) for every task and step."""
    row = copy((CALL, 0), (EXTERNAL, 0), dims=(3,))
    return _C.Program("f64", {"inner": [row], "query": [row]}, n_external=1)


def test_record_strides_and_steps_of_each_task():
    steps_of, weights = np.array([2, 0, 3], np.int64), np.array([0.5, 0.25, 2.0])
    out = np.full((3, 4, 3), -1.0)
    externals = external((out, out.strides[0], out.strides[1]))
    done(_C.run(record_program(), externals, 3, 3, steps_of.ctypes.data, weights.ctypes.data))
    for t, k in np.ndindex(3, 4):
        expected = [k, steps_of[t], weights[t]] if k <= steps_of[t] else [-1] * 3
        np.testing.assert_array_equal(out[t, k], expected)


def test_weights_default_to_one():
    out = np.zeros((2, 3))
    done(_C.run(record_program(), external((out, 24, 0)), 2, 0))
    np.testing.assert_array_equal(out, [[0, 0, 1], [0, 0, 1]])


def tree_sum(values, most=16):
    """The sum as replay forms it: in order within min(T, `most`) contiguous groups, then pairs, pairs of pairs..."""
    groups = min(len(values), most)
    sums = []
    for g in range(groups):
        total = np.float32(0)
        for value in values[g * len(values) // groups : (g + 1) * len(values) // groups]:
            total += value
        sums.append(total)
    while len(sums) > 1:
        sums = [sum(sums[n : n + 2], start=np.float32(0)) for n in range(0, len(sums), 2)]
    return sums[0]


@pytest.mark.parametrize("tasks", [1, 2, 3, 5, 15, 16, 17, 33, 100])
@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_sum_over_tasks_has_one_shape(tasks, threads):
    program = _C.Program(
        "f32", {"query": [copy((EXTERNAL, 0), (ACCUMULATOR, 0), add=True)] * 400}, accumulator_bytes=4, n_external=1
    )
    program_once = _C.Program(
        "f32", {"query": [copy((EXTERNAL, 0), (ACCUMULATOR, 0), add=True)]}, accumulator_bytes=4, n_external=1
    )
    values = np.random.default_rng(tasks).standard_normal(tasks).astype(np.float32)
    result = np.zeros(1, np.float32)
    done(_C.run(program_once, external((values, 4, 0)), tasks, 0, result_ptr=result.ctypes.data, threads=threads))
    assert result[0] == tree_sum(values)
    first = np.zeros(1, np.float32)
    done(_C.run(program, external((values, 4, 0)), tasks, 0, result_ptr=first.ctypes.data))
    done(_C.run(program, external((values, 4, 0)), tasks, 0, result_ptr=result.ctypes.data, threads=threads))
    assert result[0] == first[0]


@pytest.mark.parametrize("tasks", [1, 2, 3, 8, 9])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("elements", [1, 100_003, 300_000])
def test_large_sums(elements, threads, tasks):
    """Threads share the last addition: each writes pieces of it."""
    add = copy((EXTERNAL, 0), (ACCUMULATOR, 0), add=True, dims=(elements,))
    program = _C.Program("f32", {"query": [add]}, accumulator_bytes=4 * elements, n_external=1)
    values = np.random.default_rng(tasks).standard_normal((tasks, elements)).astype(np.float32)
    result = np.full(elements + 1, np.nan, np.float32)
    done(_C.run(program, external((values, 4 * elements, 0)), tasks, 0, result_ptr=result.ctypes.data, threads=threads))
    groups = min(tasks, 8 if elements > 1 else 16)
    np.testing.assert_array_equal(result[:-1], tree_sum(values, groups))
    assert np.isnan(result[-1])


@pytest.mark.parametrize("tasks", [33, 100])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_long_tasks_are_cut_into_more_groups(tasks, threads):
    """Up to 64, so that threads share them evenly."""
    work = pointwise([(ARENA, 0), (ARENA, 0)], [("sqrt", 1, 0)], dims=(1 << 17,))
    add = copy((EXTERNAL, 0), (ACCUMULATOR, 0), add=True)
    program = _C.Program("f32", {"query": [work, add]}, arena_bytes=4 << 17, accumulator_bytes=4, n_external=1)
    values = np.random.default_rng(tasks).standard_normal(tasks).astype(np.float32)
    result = np.zeros(1, np.float32)
    done(_C.run(program, external((values, 4, 0)), tasks, 0, result_ptr=result.ctypes.data, threads=threads))
    assert result[0] == tree_sum(values, 64)


def test_no_tasks_give_zeros():
    result = np.ones(2)
    externals = external(*[(np.zeros(1), 8, 0)] * 3)
    done(_C.run(power_program("f64"), externals, 0, 3, result_ptr=result.ctypes.data, threads=2))
    np.testing.assert_array_equal(result, [0, 0])


SIDE = 96


def chain_program(dtype="f32", sections=("inner",)):
    """state ← 0.1·(state·W) + x, with large products that are split and small ones that are not."""
    size, cells = np.dtype(DTYPES[dtype]).itemsize, SIDE * SIDE
    x, w = (EXTERNAL, 0), (EXTERNAL + 1, 0)
    step = [
        gemm((STATE, 0), w, (ARENA, 0), SIDE, SIDE, SIDE),
        gemm((ARENA, 0), w, (ARENA, cells * size), 3, 3, 3),
        pointwise([(ARENA, 0), x, (STATE_NEXT, 0)], [("fma", 2, 0, -1, 1)], dims=(SIDE, SIDE), floats=[0.01]),
        pointwise([(STATE_NEXT, 0), (ARENA, cells * size), (STATE_NEXT, 0)], [("add", 2, 0, 1)], dims=(9,)),
    ]
    whole = dict(dims=(SIDE, SIDE))
    return _C.Program(
        dtype,
        {
            "prologue": [copy(x, (STATE, 0), **whole)],
            "inner": step,
            "query": [
                copy((STATE, 0), (ACCUMULATOR, 0), add=True, **whole),
                copy((STATE, 0), (EXTERNAL + 2, 0), **whole),
            ],
        },
        arena_bytes=2 * cells * size,
        state_bytes=cells * size,
        accumulator_bytes=cells * size,
        n_external=3,
    )


def run_chain(program, tasks, threads, dtype="f32", steps=3):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((tasks, SIDE, SIDE)).astype(DTYPES[dtype])
    w = rng.standard_normal((SIDE, SIDE)).astype(DTYPES[dtype])
    out, result = np.zeros_like(x), np.zeros_like(w)
    externals = external((x, x.strides[0], 0), (w, 0, 0), (out, out.strides[0], 0))
    done(_C.run(program, externals, tasks, steps, result_ptr=result.ctypes.data, threads=threads))
    return x, w, out, result


def expect_chain(x, w, steps=3):
    state = x.astype(np.float64)
    for _ in range(steps):
        product = state @ w
        small = product[:, :1].reshape(len(x), -1)[:, :9].reshape(-1, 3, 3) @ w.reshape(-1)[:9].reshape(3, 3)
        state = 0.01 * product + x
        flat = state.reshape(len(x), -1)
        flat[:, :9] += small.reshape(-1, 9)
    return state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tasks", [1, 2, 3, 5, 18])
def test_same_bits_for_any_threads(dtype, tasks):
    """One task is split over the threads, five over two leave one group for both, eighteen leave none."""
    program = chain_program(dtype)
    assert "* gemm" in program.dump()
    x, w, out, result = run_chain(program, tasks, 1, dtype)
    tolerance = 2e-4 if dtype == "f32" else 1e-12
    np.testing.assert_allclose(out, expect_chain(x, w), rtol=tolerance, atol=tolerance)
    for threads in (1, 2, 3, 4):
        for _ in range(3):
            again = run_chain(program, tasks, threads, dtype)
            np.testing.assert_array_equal(again[2], out)
            np.testing.assert_array_equal(again[3], result)


def label_program(rows, classes):
    """One-hot of the labels in the inner section, behind a small instruction."""
    one_hot = ("one_hot", [(EXTERNAL, 0), (ARENA, 0)], [rows, classes, -100, 1, 0, 0], [])
    return _C.Program(
        "f32",
        {"inner": [fill((ARENA, 0), 1, 0.0), one_hot], "query": [fill((ACCUMULATOR, 0), 1, 1.0)]},
        arena_bytes=4 * rows * classes,
        accumulator_bytes=4,
        n_external=1,
    )


@pytest.mark.parametrize("rows", [4, 4096])
@pytest.mark.parametrize("tasks,bad", [(1, [0]), (3, [2]), (40, [7, 21, 39])])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_failure_says_where(rows, tasks, bad, threads):
    labels = np.zeros((tasks, 3, rows), np.int64)
    labels[bad, 1, rows // 2] = 5
    result = np.full(1, 7, np.float32)
    externals = external((labels, labels.strides[0], labels.strides[1]))
    program = label_program(rows, 5)
    for _ in range(5):
        outcome = _C.run(program, externals, tasks, 3, result_ptr=result.ctypes.data, threads=threads)
        assert outcome == (1, bad[0], 1, "inner", 1)
    assert result[0] == 7  # untouched
    labels[:] = 4
    done(_C.run(program, externals, tasks, 3, result_ptr=result.ctypes.data, threads=threads))


def test_failure_of_every_part_at_once():
    labels = np.full((1, 8192), 9, np.int64)
    program = label_program(8192, 5)
    for _ in range(50):
        assert _C.run(program, external((labels, 0, 0)), 1, 2, threads=4)[:3] == (1, 0, 0)


def test_cancel_before_and_while_running():
    flag = np.ones(1, np.int32)
    program, args = chain_program(), (np.zeros((1, SIDE, SIDE), np.float32), 0, 0)
    externals = external(args, args, (np.zeros((4, SIDE, SIDE), np.float32), SIDE * SIDE * 4, 0))
    status, task, step, section, instruction = _C.run(program, externals, 4, 2, cancel_ptr=flag.ctypes.data)
    assert (status, task, step, section, instruction) == (_C.CANCELLED, 0, 0, "prologue", -1)

    for tasks in (1, 4):
        flag[0] = 0
        timer = threading.Timer(0.05, flag.fill, [1])
        timer.start()
        status = _C.run(program, externals, tasks, 10**5, threads=2, cancel_ptr=flag.ctypes.data)[0]
        timer.join()
        assert status == _C.CANCELLED


def test_two_python_threads_at_once():
    program = chain_program()
    expected = run_chain(program, 5, 1)[3]
    wrong = []

    def work(threads):
        for _ in range(20):
            if not np.array_equal(run_chain(program, 5, threads)[3], expected):
                wrong.append(threads)

    workers = [threading.Thread(target=work, args=(n,)) for n in (1, 2, 3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def child_result(queue, threads):
    queue.put(run_chain(chain_program(), 5, threads)[3])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*")
def test_forked_children_run():
    """The parent's threads do not exist in a child, whether forked by hand or by a worker process of a loader."""
    expected = run_chain(chain_program(), 5, 2)[3]
    child = os.fork()
    if child == 0:
        os._exit(0 if np.array_equal(run_chain(chain_program(), 5, 2)[3], expected) else 1)
    assert os.waitpid(child, 0)[1] == 0

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=child_result, args=(queue, 2)) for _ in range(2)]
    for process in children:
        process.start()
    for _ in children:
        np.testing.assert_array_equal(queue.get(timeout=60), expected)
    for process in children:
        process.join(timeout=60)
        assert process.exitcode == 0
    np.testing.assert_array_equal(run_chain(chain_program(), 5, 2)[3], expected)


def test_memory_grows_and_is_given_back():
    _C.trim()
    assert _C.arena_bytes() == 0
    program = chain_program()
    run_chain(program, 2, 2)
    small = _C.arena_bytes()
    assert small > 2 * 3 * SIDE * SIDE * 4
    run_chain(program, 2, 1)
    assert _C.arena_bytes() == small
    first = run_chain(program, 18, 2)[3]
    assert _C.arena_bytes() > small
    _C.trim()
    assert _C.arena_bytes() == 0
    np.testing.assert_array_equal(run_chain(program, 18, 2)[3], first)


def square_program(side=SIDE):
    """A program that comes back to its states, whose large product is split."""
    step = gemm((STATE, 0), (STATE, 0), (STATE_NEXT, 0), side, side, side)
    sections = {"inner": [step], "meta": [copy((STATE, 0), (ARENA, 0), dims=(side * side,))]}
    return _C.Program("f32", sections, arena_bytes=4 * side * side, state_bytes=4 * side * side)


def bytes_held(*args, **options):
    _C.trim()
    done(_C.run(square_program(), external(), *args, **options))
    return _C.arena_bytes()


def test_fewer_states_take_less_memory():
    every_one, some = bytes_held(1, 64), bytes_held(1, 64, every=8)
    assert every_one - some == (65 - 16) * 4 * SIDE * SIDE


def test_a_thread_that_only_helps_holds_no_state():
    assert bytes_held(1, 64, threads=4) - bytes_held(1, 64) < 10 * 4 * SIDE * SIDE  # scratch memory
    assert bytes_held(2, 64, threads=4) > 2 * 64 * 4 * SIDE * SIDE


def test_forward_only_programs_keep_two_states():
    _C.trim()
    run_chain(chain_program(), 1, 1, steps=2)
    few = _C.arena_bytes()
    run_chain(chain_program(), 1, 1, steps=50)
    assert _C.arena_bytes() == few


def test_subnormals_count_as_zero_in_replay_alone():
    tiny = np.full(1, 1e-40, np.float32)
    program = _C.Program(
        "f32",
        {"query": [pointwise([(EXTERNAL, 0), (EXTERNAL + 1, 0)], [("mul", 1, 0, -1)], floats=[2.0])]},
        n_external=2,
    )
    out = np.ones(1, np.float32)
    done(_C.run(program, external((tiny, 0, 0), (out, 0, 0)), 1, 0))
    assert out[0] == 0
    assert (tiny * np.float32(2))[0] > 0


def test_constants_and_listing():
    values = np.arange(4, dtype=np.float32)
    program = _C.Program(
        "f32", {"query": [copy((CONSTANT, 4), (EXTERNAL, 0), dims=(3,))]}, constants=values.tobytes(), n_external=1
    )
    out = np.zeros(3, np.float32)
    done(_C.run(program, external((out, 0, 0)), 1, 0))
    np.testing.assert_array_equal(out, values[1:])
    assert "query 1" in repr(program)
    listing = program.dump().splitlines()
    assert listing[1] == "query:"
    assert "pointwise" in listing[2] and "constant+4, external 0+0" in listing[2]


def portions(program, *tasks, tensors=(0, 1, 2)):
    """The program for each of these numbers of tasks, each of which has 8 bytes in every tensor."""
    first = [8 * sum(tasks[:n]) for n in range(len(tasks))]
    return [(program, T, [(j, at, 8, 0) for j in tensors]) for T, at in zip(tasks, first, strict=True)]


def test_binding_refuses_what_makes_no_sense():
    program, given = power_program("f64"), [(0, torch.float64)]
    with pytest.raises(ValueError, match="a portion of the tasks expected, got none"):
        _C.Binding([], 4, [], [], [], False)
    with pytest.raises(ValueError, match=r"3 externals expected: \(tensor, offset, .* got 2"):
        _C.Binding(portions(program, 3, tensors=(0, 0)), 4, given, [], [], False)
    with pytest.raises(ValueError, match="tensors 0 to 0 expected, got 1"):
        _C.Binding(portions(program, 3), 4, given, [], [], False)
    with pytest.raises(ValueError, match="tensors 0 to 0 expected, got 3"):
        _C.Binding(portions(program, 3, tensors=(0, 0, 0)), 4, [(3, torch.float64)], [], [], False)
    binding = _C.Binding(portions(program, 3, tensors=(0, 0, 0)), 4, given, [], [], False)
    with pytest.raises(ValueError, match="1 tensors expected, got 0"):
        binding.run([], None, 1, 1, False)
    twice = _C.Binding(portions(program, 3), 4, given * 3, [], [], False)
    with pytest.raises(ValueError, match="null pointer"):  # two tensors that nobody bound
        twice.run([torch.zeros(3, dtype=torch.float64)] * 3, None, 1, 1, False)
    rooms = [(j, j, (3,), (1,), True, 0, 0) for j in range(3)]
    beyond = _C.Binding(portions(program, 3), 4, [], rooms, [("sum", 0, (8,), (1,))], False)
    with pytest.raises(ValueError, match="sums: within the"):
        beyond.run([], None, 1, 1, False)
    unlike = portions(program, 3) + portions(power_program("f32"), 3)
    with pytest.raises(ValueError, match="programs of one dtype and of the same accumulators"):
        _C.Binding(unlike, 4, [], rooms, [], False).run([], None, 1, 1, False)


@pytest.mark.parametrize("refused", [torch.zeros(3), torch.zeros(6, dtype=torch.float64)[::2]])
def test_binding_names_a_tensor_that_cannot_be_read_where_it_lies(refused):
    given = [(j, torch.float64) for j in range(3)]
    binding = _C.Binding(portions(power_program("f64"), 3), 4, given, [], [], False)
    fine = torch.zeros(3, dtype=torch.float64)
    assert binding.run([fine, refused, fine], None, 1, 1, False) == 1


@pytest.mark.parametrize("tasks", [(3,), (2, 1), (1, 0, 2)])
def test_profile_counts_calls(tasks):
    rooms = [(j, j, (3,), (1,), True, 0, 0) for j in range(3)]
    binding = _C.Binding(portions(power_program("f64"), *tasks), 4, [], rooms, [], False)
    each = binding.profile([], None)
    assert [rows[0][3] for rows in each] == list(tasks)
    rows = [(*same[0][:3], sum(row[3] for row in same), 0.0) for same in zip(*each, strict=True)]
    assert [(section, n, kernel, calls) for section, n, kernel, calls, _ in rows] == [
        ("prologue", 0, "pointwise", 3),
        ("inner", 0, "pointwise", 12),
        ("query", 0, "pointwise", 3),
        ("query", 1, "pointwise", 3),
        ("meta", 0, "pointwise", 12),
        ("meta", 1, "pointwise", 12),
        ("epilogue", 0, "pointwise", 3),
    ]
    assert all(seconds >= 0 for *_, seconds in rows)


ILL_FORMED = {
    "unknown kernel": (("frobnicate", [], [], []), "no kernel of this name"),
    "operand count": (("fill", [(ARENA, 0)] * 2, [1], [0.0]), "1 operands expected, got 2"),
    "int count": (("fill", [(ARENA, 0)], [1, 2], [0.0]), "1 ints expected, got 2"),
    "float count": (("fill", [(ARENA, 0)], [1], []), "at least 1 floats expected, got 0"),
    "negative size": (("fill", [(ARENA, 0)], [-1], [0.0]), "at least 0 expected, got -1"),
    "unknown space": (("fill", [(EXTERNAL + 1, 0)], [1], [0.0]), "no such space; 0 to 9 expected"),
    "negative space": (("fill", [(-1, 0)], [1], [0.0]), "no such space"),
    "space of another section": (("fill", [(ADJOINT_NEXT, 0)], [1], [0.0]), "may not be used in this section"),
    "too long": (("fill", [(ARENA, 4)], [16], [0.0]), "bytes 4 to 68 are written, but the space has 64"),
    "negative offset": (("fill", [(ARENA, -4)], [1], [0.0]), "bytes -4 to 0 are written"),
    "misaligned": (("fill", [(ARENA, 2)], [1], [0.0]), "a multiple of the element's 4 bytes"),
    "read-only constant": (("fill", [(CONSTANT, 0)], [1], [0.0]), "read only"),
    "read-only record": (("fill", [(CALL, 0)], [1], [0.0]), "read only"),
    "opcode": (("pointwise", [(ARENA, 0)] * 2, [1] * 4 + [2, 1, 1, 1, 1, 0, 999, 1, 0, 0, 0, 1], []), "make no sense"),
    "register": (("pointwise", [(ARENA, 0)] * 2, [1] * 4 + [2, 1, 1, 1, 1, 0, 0, 7, 0, 0, 0, 1], []), "make no sense"),
    "compiled": (("pointwise", [(ARENA, 0)] * 2, [1] * 4 + [2, 1, 1, 1, 1, 0, 0, 1, 0, 0, 0, 2], []), "compiled"),
    "sum of nothing": (("pointwise", [(ARENA, 0)] * 2, [2, 1, 1, 0, 1, 0, 20, 20, 1, 0, 1, 0, 2, 1], []), "0 to 80"),
    "mode": (("gemm", [(ARENA, 0)] * 3, [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 4, 0, 0], []), "mode"),
    "geometry": (
        ("conv_fwd", [(ARENA, 0)] * 3, [1, 4, 4, 1, 1, 3, 3, 1, 1, 0, 0, 1, 1, 3, 2, 9, 9, 3, 1, 0, 0, 0], []),
        "output height: 2 to 2 expected, got 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ILL_FORMED)
def test_ill_formed_instructions_are_refused(case):
    instruction, message = ILL_FORMED[case]
    with pytest.raises(ValueError) as error:
        _C.Program(
            "f32", {"inner": [fill((ARENA, 0), 1, 0.0), instruction]}, arena_bytes=64, constants=b"1234", n_external=1
        )
    assert f'Program: section "inner", instruction 1 ({instruction[0]}): ' in str(error.value)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "options,message",
    [
        (dict(dtype="f16"), 'dtype: "f32" or "f64" expected, got "f16"'),
        (dict(sections={"outer": []}), 'got "outer"'),
        (dict(sections={"inner": [("fill",)]}), 'section "inner", instruction 0'),
        (dict(arena_bytes=-1), "arena_bytes: at least 0 expected, got -1"),
        (dict(accumulator_bytes=6), "accumulator_bytes: a multiple of 4"),
        (dict(isa="mmx"), 'isa: "best" or one of'),
    ],
)
def test_ill_formed_programs_are_refused(options, message):
    with pytest.raises(ValueError, match="(?s).*" + message.replace("(", r"\(")):
        _C.Program(**{"dtype": "f32", "sections": {}, **options})


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(externals=np.zeros((2, 3), np.int64)), "3 externals expected, got 2"),
        (dict(externals=np.zeros((3, 2), np.int64)), r"shape \(n_external, 3\) expected"),
        (dict(T=-1), "tasks: at least 0 expected, got -1"),
        (dict(steps=-1), "steps: at least 0 expected, got -1"),
        (dict(threads=0), "threads: 1 to 256 expected, got 0"),
        (dict(row=(0, 0)), "external 0: null pointer"),
        (dict(row=(1, 4)), "external 1: pointer and strides must be multiples of the element's 8 bytes"),
        (dict(row=(2, None)), "external 2: every task writes to the same place"),
    ],
)
def test_calls_that_make_no_sense_are_refused(change, message):
    arrays = [np.zeros(2) for _ in range(3)]
    call = dict(externals=external(*((a, 8, 0) for a in arrays)), T=2, steps=1)
    if "row" in change:
        j, pointer = change["row"]
        call["externals"][j, 0 if pointer is not None else 1] = pointer or 0
    else:
        call.update(change)
    with pytest.raises(ValueError, match=message):
        _C.run(power_program("f64"), **call)


def test_steps_beyond_the_most_are_refused():
    steps_of = np.array([1, 4], np.int64)
    with pytest.raises(ValueError, match="steps of task 1: 0 to 3 expected, got 4"):
        _C.run(record_program(), external((np.zeros((2, 4, 3)), 96, 24)), 2, 3, steps_of.ctypes.data)


@pytest.mark.parametrize("every", [0, 4])
def test_states_of_no_step_or_beyond_the_last_are_refused(every):
    with pytest.raises(ValueError, match=f"every: 1 to 3 expected, got {every}"):
        _C.run(record_program(), external((np.zeros((2, 4, 3)), 96, 24)), 2, 3, every=every)


def test_run_kernel_checks_counts():
    data = np.zeros(4, np.float32)
    assert _C.run_kernel("fill", "f32", "best", [data.ctypes.data], [4], [2.0]) == 0
    np.testing.assert_array_equal(data, 2)
    assert _C.run_kernel("fill", "f32", _C.isas()[0], [data.ctypes.data], [4], [3.0], parts=3) == 0
    np.testing.assert_array_equal(data, 3)
    with pytest.raises(ValueError, match="1 pointers expected, got 0"):
        _C.run_kernel("fill", "f32", "best", [], [4], [2.0])
    with pytest.raises(ValueError, match="no kernel of this name"):
        _C.run_kernel("frobnicate", "f32", "best", [], [], [])


def test_the_stub_says_what_the_module_has():
    """Every public name, and every function's arguments in their order."""
    stub = ast.parse(importlib.resources.files("metafast").joinpath("_C.pyi").read_text())
    names = {node.name for node in stub.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    names |= {n.target.id for n in stub.body if isinstance(n, ast.AnnAssign)}
    assert names == {name for name in dir(_C) if not name.startswith("_")}
    classes = [node for node in stub.body if isinstance(node, ast.ClassDef)]
    for owner, functions in ((_C, stub.body), *((getattr(_C, node.name), node.body) for node in classes)):
        for node in functions:
            if isinstance(node, ast.FunctionDef):
                signature = getattr(owner, node.name).__doc__.splitlines()[0]
                assert re.findall(r"(\w+): ", signature) == [a.arg for a in node.args.args], signature
