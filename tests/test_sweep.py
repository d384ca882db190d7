"""The sections of a sweep, run node by node, against a plain loop of autograd.grad in float64."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
import torch.nn.functional as F
from interpret import interpret
from torch import Tensor

from metafast.graph import Builder, Graph, Value, evaluate
from metafast.ops.contract import transpose
from metafast.sweep import Loop, Sweep, common_factor

SHAPES = {"w1": (4, 3), "b1": (4,), "w2": (2, 4)}
TASKS, SUPPORT, QUERY = 3, 5, 7
F64 = torch.float64


def loss_graph(role: str, n: int) -> Graph:
    """Mean squared error of a two-layer tanh net."""
    b = Builder()
    x, y = b.input(role, "0", (n, 3)), b.input(role, "1", (n, 2))
    w1, b1, w2 = (b.input("param", name, shape) for name, shape in SHAPES.items())
    h = b.op("tanh", b.op("add", b.op("matmul", x, transpose(b, w1)), b1))
    out = b.op("matmul", h, transpose(b, w2))
    total = b.op("sum", b.op("square", b.op("sub", out, y)), dims=(0, 1))
    return b.finish({"loss": b.op("mul", total, b.const(1 / (2 * n))), "output/0": out})


def loss(p: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(torch.tanh(x @ p["w1"].T + p["b1"]) @ p["w2"].T, y)


def update_graph(names: tuple[str, ...]) -> Graph:
    """Momentum with a rate that grows with k and a pull towards φ₀: every input of a rule at once."""
    b = Builder()
    out: dict[str, Value] = {}
    for n in names:
        p, g, s, p0 = (b.input(role, n, SHAPES[n]) for role in ("param", "grad", "state", "param0"))
        moved = b.op("add", b.op("mul", s, b.const(0.9)), g)
        rate = b.op("mul", b.input("hyper", "lr", ()), b.op("add", b.input("step", "k", ()), b.const(1.0)))
        pulled = b.op("mul", b.const(0.1), b.op("sub", p, p0))
        out[f"param/{n}"] = b.op("sub", b.op("sub", p, b.op("mul", rate, moved)), pulled)
        out[f"state/{n}"] = moved
    return b.finish(out)


def init_graph(names: tuple[str, ...]) -> Graph:
    b = Builder()
    return b.finish(
        {f"state/{n}": b.op("mul", b.input("param", n, SHAPES[n]), b.const(0.3)) for n in names}
    )


def oracle(
    leaves: Mapping[str, Tensor], names: tuple[str, ...], order: int, steps: int, weights: Tensor
) -> Tensor:
    """Σ w_t · query loss, by autograd."""
    meta = {n: leaves[f"param/{n}"] for n in SHAPES}
    total = torch.zeros((), dtype=F64)
    for t in range(TASKS):
        p, s = dict(meta), {n: 0.3 * meta[n] for n in names}
        for k in range(steps):
            support = loss(p, leaves["support/0"][t], leaves["support/1"][t])
            grads = torch.autograd.grad(support, [p[n] for n in names], create_graph=True)
            for n, g in zip(names, grads, strict=True):
                s[n] = 0.9 * s[n] + (g if order == 2 else g.detach())
                p[n] = p[n] - leaves["hyper/lr"] * (k + 1) * s[n] - 0.1 * (p[n] - meta[n])
        total = total + weights[t] * loss(p, leaves["query/0"][t], leaves["query/1"][t])
    return total


@pytest.mark.parametrize("names", [("w1", "b1", "w2"), ("w2",)], ids=["all", "head"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_sections_are_the_meta_gradient(names: tuple[str, ...], order: int, steps: int) -> None:
    torch.manual_seed(0)
    leaves = {f"param/{n}": torch.randn(s, dtype=F64) for n, s in SHAPES.items()}
    leaves["hyper/lr"] = torch.tensor(0.05, dtype=F64)
    for part, n in (("support", SUPPORT), ("query", QUERY)):
        leaves[f"{part}/0"] = torch.randn(TASKS, n, 3, dtype=F64)
        leaves[f"{part}/1"] = torch.randn(TASKS, n, 2, dtype=F64)
    for leaf in leaves.values():
        leaf.requires_grad_()
    weights = torch.rand(TASKS, dtype=F64)
    loop = Loop(
        loss_graph("support", SUPPORT),
        loss_graph("query", QUERY),
        update_graph(names),
        init_graph(names),
        names,
        SHAPES,
        tuple(leaves),
        order,
    )
    values = {key: leaf.detach() for key, leaf in leaves.items()}
    got = interpret(Sweep(loop).sections("fused"), values, ("support/", "query/"), TASKS, steps, weights)
    total = oracle(leaves, names, order, steps, weights)
    for (key, leaf), want in zip(
        leaves.items(), torch.autograd.grad(total, list(leaves.values()), allow_unused=True), strict=True
    ):
        mine = got.get(("gradient", key), torch.zeros_like(leaf))
        torch.testing.assert_close(mine, torch.zeros_like(leaf) if want is None else want, rtol=1e-9, atol=1e-12)
    assert (got["loss", "loss"] @ weights - total).abs() < 1e-12


def test_what_does_not_adapt_is_computed_once() -> None:
    """With an adapting head the first layer lies in the prologue, and neither inner nor meta repeats it."""
    names = ("w2",)
    loop = Loop(
        loss_graph("support", SUPPORT),
        loss_graph("query", QUERY),
        update_graph(names),
        init_graph(names),
        names,
        SHAPES,
        ("param/w1", "param/w2"),
        2,
    )
    sections = Sweep(loop).sections("fused")
    count = {name: sum(n.op == "tanh" for n in s.graph.nodes) for name, s in sections.items()}
    assert count == {"prologue": 1, "inner": 0, "query": 1, "meta": 0, "epilogue": 0}


def test_a_common_factor_is_taken_out() -> None:
    b = Builder()
    x, y, s = b.input("adjoint", "x", (3,)), b.input("adjoint", "y", (2, 2)), b.input("leaf", "hyper/lr", ())
    scale, rest = common_factor(b, {x: b.op("neg", b.op("mul", x, s)), y: b.op("neg", b.op("mul", s, y))})
    assert rest == {x: x, y: y}
    graph = b.finish({"scale": scale})
    torch.testing.assert_close(evaluate(graph, {("leaf", "hyper/lr"): torch.tensor(0.5)})["scale"], torch.tensor(-0.5))


def test_factors_that_differ_stay() -> None:
    b = Builder()
    x, y, s = b.input("adjoint", "x", (3,)), b.input("adjoint", "y", (3,)), b.input("leaf", "hyper/lr", ())
    for values in ({x: b.op("mul", x, s), y: b.op("neg", b.op("mul", y, s))}, {x: x, y: y}, {x: b.op("mul", x, y)}, {}):
        assert common_factor(b, values) == (None, values)
