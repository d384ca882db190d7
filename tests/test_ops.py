"""Every op against PyTorch: value, both derivative rules, and the tangent of its adjoint, on every backend.

A rule is tested the way the pipeline uses it: `pull` and `push` over a Graph. What it yields is compared with
torch.func on an independent PyTorch spelling of the op (`cases.REFERENCE`), in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from cases import CASES, Case, reference, write

from metafast.differentiate import pull, push
from metafast.graph import Builder, Graph, copy_into, evaluate, same_input
from metafast.ops import TABLE

# torch.func.jvp loads its decompositions through torch.jit.script at its first use.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

EXACT = 1e-10  # float64, relative to the largest magnitude of the exact result
Values = dict[tuple[str, str], torch.Tensor]
Run = Callable[[Graph, Mapping[tuple[str, str], torch.Tensor]], dict[str, torch.Tensor]]
ALL = pytest.mark.parametrize("case", CASES, ids=str)


# ---- graphs of derivatives ------------------------------------------------------------------------


def adjoint(graph: Graph, moving: list[str], *, tangent: bool = False) -> Graph:
    """Outputs g<i>: the cotangents of the arguments along inputs ("ct", y).

    With `tangent`, how those move along ("dot", i) and ("dotct", y) instead.
    """
    b = Builder()
    env = copy_into(b, graph, same_input(b))
    leaves = {i: env[v] for i in moving if (v := graph.input("arg", i)) is not None}
    cts = {env[v]: b.input("ct", y, v.shape) for y, v in graph.outputs.items()}
    out = dict(zip(leaves, pull(b, cts, list(leaves.values())), strict=True))
    if tangent:
        tangents = {v: b.input("dot", i, v.shape) for i, v in leaves.items()}
        tangents |= {
            v: b.input("dotct", y, v.shape) for y, v in zip(graph.outputs, cts.values(), strict=True)
        }
        kept = [i for i, v in out.items() if v is not None]
        out = dict(zip(kept, push(b, tangents, [out[i] for i in kept]), strict=True))
    return b.finish({f"g{i}": v for i, v in out.items() if v is not None})


def tangent(graph: Graph, moving: list[str]) -> Graph:
    """Outputs y<j>: the tangents of the outputs along inputs ("dot", i)."""
    b = Builder()
    env = copy_into(b, graph, same_input(b))
    tangents = {
        env[v]: b.input("dot", i, v.shape) for i in moving if (v := graph.input("arg", i)) is not None
    }
    moved = push(b, tangents, [env[v] for v in graph.outputs.values()])
    return b.finish({y: v for y, v in zip(graph.outputs, moved, strict=True) if v is not None})


class Example:
    """A case with its graph, its PyTorch function, its numbers, and random vectors to differentiate along."""

    def __init__(self, case: Case, dtype: torch.dtype = torch.float64) -> None:
        self.case, self.graph, self.dtype = case, write(case), dtype
        self.dense = case.tensors(dtype)
        self.moving = [str(i) for i, a in enumerate(case.args) if a.moves]
        values = self.exact()
        draw = torch.Generator().manual_seed(7)

        def like(t: torch.Tensor) -> torch.Tensor:
            return torch.randn(t.shape, generator=draw, dtype=torch.float64).to(dtype)

        self.v = {i: like(self.dense[int(i)]) for i in self.moving}
        self.w = {y: like(t) for y, t in zip(self.graph.outputs, values, strict=True)}
        self.w_dot = {y: like(t) for y, t in self.w.items()}

    def exact(self) -> tuple[torch.Tensor, ...]:
        """The values in float64, from the numbers as the dtype holds them."""
        return reference(self.case)(*(_wide(t) for t in self.dense))

    def of_moving(self) -> Callable[..., tuple[torch.Tensor, ...]]:
        """The reference as a function of the arguments that move, in float64."""
        f, fixed = reference(self.case), [_wide(t) for t in self.dense]

        def function(*moving: torch.Tensor) -> tuple[torch.Tensor, ...]:
            args = list(fixed)
            for i, x in zip(self.moving, moving, strict=True):
                args[int(i)] = x
            return f(*args)

        return function

    def points(self) -> tuple[torch.Tensor, ...]:
        return tuple(_wide(self.dense[int(i)]) for i in self.moving)

    def values(self) -> Values:
        """What a graph of this example reads, whichever derivative it is."""
        named: dict[str, dict[str, torch.Tensor]] = {
            "arg": {str(i): t for i, t in enumerate(self.dense)},
            "ct": self.w,
            "dot": self.v,
            "dotct": self.w_dot,
        }
        return {(role, name): t for role, group in named.items() for name, t in group.items()}

    @functools.cached_property
    def vjp(self) -> dict[str, torch.Tensor]:
        _, pullback = torch.func.vjp(self.of_moving(), *self.points())
        return self._named(pullback(tuple(_wide(t) for t in self.w.values())))

    @functools.cached_property
    def jvp(self) -> dict[str, torch.Tensor]:
        along = tuple(_wide(t) for t in self.v.values())
        _, moved = torch.func.jvp(self.of_moving(), self.points(), along)
        return dict(zip(self.graph.outputs, moved, strict=True))

    @functools.cached_property
    def jvp_of_vjp(self) -> dict[str, torch.Tensor]:
        def gradient(points: Any, cotangents: Any) -> Any:
            return torch.func.vjp(self.of_moving(), *points)[1](cotangents)

        at = self.points(), tuple(_wide(t) for t in self.w.values())
        along = tuple(_wide(t) for t in self.v.values()), tuple(_wide(t) for t in self.w_dot.values())
        return self._named(torch.func.jvp(gradient, at, along)[1])

    def _named(self, gradients: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
        return {f"g{i}": g for i, g in zip(self.moving, gradients, strict=True)}

    def derivative(self, which: str) -> tuple[Graph, dict[str, torch.Tensor]]:
        """The graph and what PyTorch says its outputs are; skips where the op has no such derivative."""
        if which == "forward":
            return self.graph, dict(zip(self.graph.outputs, self.exact(), strict=True))
        row = TABLE[self.case.op]
        if row.vjp is None:
            pytest.skip("appears only in tangents: nothing differentiates it")
        if not self.moving:
            pytest.skip("has no real argument that moves")
        if which == "vjp":
            return adjoint(self.graph, self.moving), self.vjp
        if which == "jvp":
            return tangent(self.graph, self.moving), self.jvp
        return adjoint(self.graph, self.moving, tangent=True), self.jvp_of_vjp


example_of = functools.cache(Example)


def _wide(t: torch.Tensor) -> torch.Tensor:
    return t.double() if t.is_floating_point() else t


def assert_near(got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], bound: float) -> None:
    """Each array within `bound` of the largest magnitude expected; what is missing is a symbolic zero."""
    assert set(got) <= set(expected)
    for name, exact in expected.items():
        value = got[name].double() if name in got else torch.zeros_like(exact)
        assert value.shape == exact.shape, name
        if exact.numel():
            error = (value - exact).abs().max().item()
            assert error <= bound * max(exact.abs().max().item(), 1e-30), f"{name}: {error:.2e}"


# ---- the table itself -----------------------------------------------------------------------------


def test_every_op_has_a_case() -> None:
    assert set(TABLE) == {c.op for c in CASES}


def test_cases_have_names_of_their_own() -> None:
    names = [str(c) for c in CASES]
    assert len(set(names)) == len(names)


# ---- rules, evaluated with PyTorch ----------------------------------------------------------------

DERIVATIVES = ["forward", "vjp", "jvp", "jvp of vjp"]


@ALL
@pytest.mark.parametrize("which", DERIVATIVES)
def test_rules(case: Case, which: str) -> None:
    example = example_of(case)
    graph, expected = example.derivative(which)
    assert_near(evaluate(graph, example.values()), expected, EXACT)


@ALL
def test_the_adjoint_is_the_transpose(case: Case) -> None:
    """⟨w, J v⟩ = ⟨Jᵀ w, v⟩: catches a rule that returns J for Jᵀ, or one half of a pair that is off."""
    example = example_of(case)
    adjoint_graph, _ = example.derivative("vjp")
    tangent_graph, _ = example.derivative("jvp")
    values = example.values()
    w_jv = _dot(example.w, evaluate(tangent_graph, values), "")
    jtw_v = _dot(example.v, evaluate(adjoint_graph, values), "g")
    assert w_jv == pytest.approx(jtw_v, rel=1e-10, abs=1e-12)


def _dot(fixed: Mapping[str, torch.Tensor], moved: Mapping[str, torch.Tensor], prefix: str) -> float:
    return sum(float((t * moved[prefix + k]).sum()) for k, t in fixed.items() if prefix + k in moved)


# ---- the native backend ---------------------------------------------------------------------------


def run_native() -> Run:
    """`run(graph, values)` of the native backend; skips where it is not built."""
    pytest.importorskip("metafast._C", reason="the native backend is not built", exc_type=ImportError)
    from metafast.native import evaluate as run

    return run


@ALL
@pytest.mark.parametrize("which", DERIVATIVES)
def test_native_in_float64(case: Case, which: str) -> None:
    run, example = run_native(), example_of(case)
    graph, expected = example.derivative(which)
    assert_near(run(graph, example.values()), expected, EXACT)


@ALL
@pytest.mark.parametrize("which", DERIVATIVES)
def test_native_in_float32(case: Case, which: str) -> None:
    """The forward within its row's bound; a derivative within the sum of the bounds of its rows."""
    run, example = run_native(), example_of(case, torch.float32)
    graph, expected = example.derivative(which)
    bound = TABLE[case.op].bound if which == "forward" else sum(TABLE[n.op].bound for n in graph.nodes)
    got = run(graph, example.values())
    assert all(t.dtype == torch.float32 for t in got.values())
    assert_near(got, expected, bound)
