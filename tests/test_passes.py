"""The passes that a program can do without: each left out, the gradients are the same and the program is another."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import Gradients, answer, assert_float32, assert_same, exact_answer, inner_loop, metafast_gradients, named
from test_invariants import _repeat
from torch.utils import _pytree as pytree
from zoo import ENTRIES, LR, Entry, Task
from zoo import named as entry_named

import metafast
from metafast import dispatch
from metafast.division import Portion
from metafast.native import captured, make_plan
from metafast.ops import numel
from metafast.passes import PASSES, enabled, left_out, without

pytest.importorskip("metafast._C", reason="the native backend is not built", exc_type=ImportError)

EACH_PASS = pytest.mark.parametrize("name", PASSES)
STEPS, TASKS = 3, 64
CASES = [("anil", 2, "fused"), ("attention", 2, "fused"), ("skip_connections", 2, "fused"), ("huber", 1, "adapt")]


# ---- what is computed -------------------------------------------------------------------------------------------


@EACH_PASS
@pytest.mark.parametrize(("entry", "order", "way"), CASES)
def test_float64(entry: str, order: int, way: str, name: str) -> None:
    check(entry_named(entry), order, way, name)


@EACH_PASS
@pytest.mark.parametrize("entry", [entry_named(n) for n in ("mlp_relu", "wide_conv")], ids=str)
def test_float32(entry: Entry, name: str) -> None:
    with without(name):
        assert_float32(entry, 2, STEPS, "fused")


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_with_none_of_them(entry: Entry) -> None:
    check(entry, 2, "fused", *PASSES)


@EACH_PASS
def test_many_tasks(name: str) -> None:
    """So many of a small net that they lie side by side, unless that is what is left out."""
    task = many()
    with without(name):
        got = metafast_gradients(inner_loop(task, "native", steps=STEPS, order=2), task, "fused")[1]
    assert_same(got, exact_many())


def many() -> Task:
    task = entry_named("mlp_layer_norm").make()
    task.support, task.query = pytree.tree_map(lambda t: _repeat(t, 16), (task.support, task.query))
    return task


@functools.cache
def exact_many() -> Gradients:
    return named(answer(many(), 2, STEPS))


@pytest.mark.parametrize("way", ["fused", "adapt"])
@pytest.mark.parametrize("names", [(), ("straight",)], ids=str)
def test_a_rate_that_is_not_learned_to_first_order(names: tuple[str, ...], way: str) -> None:
    """Then adjoints are only handed on."""
    entry = entry_named("wide_linear")
    task = entry.make()
    with without(*names):
        inner = inner_loop(task, "native", metafast.SGD(lr=LR), steps=STEPS, order=1)
        got = metafast_gradients(inner, task, way)[1]
    expected = named(exact_answer(entry, 1, STEPS, torch.float64, False))
    assert_same(got, {name: g for name, g in expected.items() if name != "hyper 0"})


def check(entry: Entry, order: int, way: str, *names: str) -> None:
    """Loss, gradients and running statistics are those of the eager loop."""
    task = entry.make()
    with without(*names):
        loss, got = metafast_gradients(inner_loop(task, "native", steps=STEPS, order=order), task, way)
    expected = exact_answer(entry, order, STEPS, torch.float64, False)
    torch.testing.assert_close(loss, expected.losses.mean(), rtol=1e-12, atol=0.0)
    assert_same(got, named(expected))
    for buffer, value in task.model.named_buffers() if way == "fused" else ():
        torch.testing.assert_close(value, expected.buffers[buffer], rtol=1e-10, atol=1e-12)


# ---- what each pass is for --------------------------------------------------------------------------------------

Measure = Callable[[Sequence[Portion]], float]


def _over_call(of: Callable[[Any], float]) -> Measure:
    """A number of each instruction, added up over the tasks and steps of a call."""

    def measure(portions: Sequence[Portion]) -> float:
        runs = {"inner": STEPS, "meta": STEPS}
        sections = [(p.blocks * runs.get(name, 1), code) for p in portions for name, code in p.lowered.code.items()]
        return sum(often * sum(map(of, code)) for often, code in sections)

    return measure


def _operations(ins: Any) -> float:
    """Of a pointwise instruction, for each element."""
    return float(ins.ints[3] * numel(tuple(ins.ints[5 : 5 + ins.ints[0]]))) if ins.kernel == "pointwise" else 0.0


def _added_alone(ins: Any) -> float:
    """Elements that one thread adds up, none of another's to share."""
    if ins.kernel != "pointwise":
        return 0.0
    rank, n_in, n_out = ins.ints[:3]
    strides = ins.ints[5 + rank : 5 + rank * (1 + n_in + n_out)]
    modes = ins.ints[5 + rank * (1 + n_in + n_out) + n_out :][:n_out]
    alone = [modes[k] >= 2 and (rank < 2 or strides[(n_in + k) * rank] == 0) for k in range(n_out)]
    return float(any(alone) * numel(tuple(ins.ints[5 : 5 + rank])))


instructions = _over_call(lambda ins: 1)
flops = _over_call(lambda ins: ins.flops)
operations = _over_call(_operations)
written = _over_call(lambda ins: sum(numel(ins.operands[k].shape) for k in ins.writes))
copies = _over_call(lambda ins: ins.note.startswith("copy"))
added_alone = _over_call(_added_alone)
interpreted = _over_call(lambda ins: ins.kernel == "pointwise" and not ins.ints[-1])
direct_convolutions = _over_call(lambda ins: ins.kernel.startswith("conv_") and not ins.ints[20])

#: A model and what the pass makes less of there.
LESS: Mapping[str, tuple[str, Measure]] = {
    "winners": ("anil", operations),
    "hoist": ("anil", flops),
    "factor": ("mlp_relu", operations),
    "straight": ("wide_linear", written),
    "thin": ("wide_linear", written),
    "keep": ("mlp_relu", flops),
    "lanes": ("mlp_relu", instructions),
    "spell": ("sinusoid", instructions),
    "clusters": ("mlp_gelu", instructions),
    "lazy": ("mlp_relu", written),
    "reductions": ("anil", instructions),
    "parts": ("large_images", added_alone),
    "sums": ("mlp_relu", operations),
    "pairs": ("mlp_relu", instructions),
    "bias": ("anil", instructions),
    "onto": ("mlp_relu", operations),
    "direct": ("mlp_relu", written),
    "layout": ("anil", copies),
    "copies": ("wide_conv", copies),
    "masks": ("mlp_relu", operations),
    "winograd": ("wide_conv", direct_convolutions),
    "code": ("mlp_relu", interpreted),
    "bundle": ("mlp_relu", instructions),
    "chunks": ("large_images", lambda portions: portions[0].lowered.arena_bytes),
    "inplace": ("mlp_relu", lambda portions: portions[0].lowered.arena_bytes),
    "reuse": ("mlp_relu", lambda portions: portions[0].lowered.arena_bytes),
}


ORDER = {"straight": 1, "thin": 1}  # 2 for the others
INSTEAD = {"straight": ("thin",)}  # what leaves it nothing to do


def test_each_is_for_something() -> None:
    assert list(LESS) == list(PASSES)


@pytest.mark.shows()
@EACH_PASS
def test_there_is_less_with_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metafast.division._cores", lambda: 2)
    monkeypatch.setattr("metafast.lower.chunk.LEAST", 1 << 16)
    entry, measure = LESS[name]
    with without(*INSTEAD.get(name, ())):
        with_it = measure(program(entry_named(entry), ORDER.get(name, 2)))
        with without(name):
            assert with_it < measure(program(entry_named(entry), ORDER.get(name, 2)))


def program(entry: Entry, order: int) -> Sequence[Portion]:
    """To first order with a rate that is not learned."""
    task = entry.make(torch.float32)
    inner = inner_loop(task, "native", metafast.SGD(lr=LR) if order == 1 else None, steps=STEPS, order=order)
    problem = inner._problem(task.support, task.query, gradient=True)[0]
    return make_plan(problem, captured(problem)).best("fused", TASKS, STEPS)


@pytest.mark.shows("winograd")
def test_the_flag_of_winograd_reaches_the_kernel() -> None:
    """Another form rounds otherwise."""
    found = []
    for names in ((), ("winograd",)):
        task = entry_named("wide_conv").make(torch.float32)
        with without(*names):
            found.append(metafast_gradients(inner_loop(task, "native", steps=1, order=1), task, "fused")[1])
    assert not torch.equal(found[0]["0.weight"], found[1]["0.weight"])
    torch.testing.assert_close(found[0]["0.weight"], found[1]["0.weight"], rtol=1e-3, atol=1e-6)


# ---- the switch -------------------------------------------------------------------------------------------------


def test_every_pass_is_asked_for() -> None:
    root = Path(metafast.__file__).parent
    asked = {name for path in root.rglob("*.py") for name in re.findall(r'\benabled\("(\w+)"\)', path.read_text())}
    assert asked == set(PASSES)


def test_no_program_outlives_what_was_left_out() -> None:
    """A call like the last, with other passes, has a plan of its own; going back finds the first again."""
    task = entry_named("mlp_relu").make()
    inner = inner_loop(task, "native", steps=STEPS)

    def plans() -> list[Any]:
        inner(task.support, task.query)
        return [choice.backend.plan for choice in dispatch._plans[task.model].values()]

    first = plans()
    with without("clusters"):
        second = plans()
    assert len(first) == 1 and len(second) == 2 and second[0] is first[0]
    (one,), (other,) = (plan.programs.values() for plan in second)
    assert all(len(one.code[section]) < len(other.code[section]) for section in ("inner", "query", "meta"))
    assert plans() == second


def test_blocks_nest_and_end_with_an_error() -> None:
    before = left_out()
    with pytest.raises(ZeroDivisionError), without("bias"), without("sums", "bias"):
        assert left_out() == before | {"bias", "sums"} and not enabled("sums")
        raise ZeroDivisionError
    assert left_out() == before


def test_a_name_that_is_none() -> None:
    with pytest.raises(metafast.errors.InputError, match=r"got fusion.* there are winners, hoist"), without("fusion"):
        pass
    with pytest.raises(KeyError):
        enabled("fusion")


def test_the_environment() -> None:
    """METAFAST_WITHOUT is read once, where metafast is imported."""
    code = "from metafast.passes import left_out; print(*sorted(left_out()))"

    def told(names: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "METAFAST_WITHOUT": names}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)

    assert told("winograd, clusters").stdout.split() == ["clusters", "winograd"]
    assert "METAFAST_WITHOUT: got fusion" in told("fusion").stderr
