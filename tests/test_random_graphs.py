"""Random programs: what fusing, layouts and the memory plan do to a graph must not change what it computes.

A graph of some dozen nodes over shapes that fit is drawn from the op table, with its gradient and the tangent
of that gradient, and run natively beside `graph.evaluate`, in float64.
"""

from __future__ import annotations

import random

import pytest
import torch

from metafast.differentiate import push, with_gradient
from metafast.graph import Builder, Graph, Value, copy_into, evaluate, same_input
from metafast.ops import sum_to

SMOOTH = ["exp", "tanh", "sigmoid", "sin", "cos", "softplus", "erf", "square", "neg"]
KINKED = ["relu", "abs"]
BINARY = ["add", "sub", "mul", "maximum", "minimum"]


class Writer:
    """Draws nodes; every value stays of moderate size, so that float64 results agree closely."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.b = Builder()
        self.values: list[Value] = []
        for i, shape in enumerate([(2, 4, 6, 6), (4, 5), (5,), (1, 6), (3, 4, 3, 3), ()]):
            self.values.append(self.b.input("arg", str(i), shape))

    def pick(self, *ranks: int) -> Value:
        """A value of one of the ranks, recent ones more often."""
        fitting = [v for v in self.values if not ranks or len(v.shape) in ranks]
        return fitting[-1 - min(int(self.rng.expovariate(0.35)), len(fitting) - 1)]

    def tame(self, v: Value) -> Value:
        """sin, so that products and exponentials do not grow from node to node."""
        return self.b.op("sin", v)

    def step(self) -> None:
        kinds = [self.unary, self.binary, self.view, self.cut, self.total, self.select, self.join]
        kinds += [self.product, self.convolve, self.pool, self.normalise, self.softmax]
        made = self.rng.choice(kinds)()
        if made is not None and 0 < torch.Size(made.shape).numel() <= 2000:
            self.values.append(made)

    def off_kink(self, v: Value) -> Value:
        """Moved, so that what is zero up to rounding does not lie on a kink."""
        return self.b.op("add", v, self.b.const(0.1237))

    def unary(self) -> Value:
        name, x = self.rng.choice(SMOOTH + KINKED), self.tame(self.pick())
        return self.b.op(name, self.off_kink(x) if name in KINKED else x)

    def binary(self) -> Value | None:
        x = self.pick()
        fitting = [v for v in self.values if v.shape == x.shape[len(x.shape) - len(v.shape) :] or not v.shape]
        fitting += [
            v
            for v in self.values
            if len(v.shape) == len(x.shape)
            and all(a in (1, b) or b == 1 for a, b in zip(v.shape, x.shape, strict=True))
        ]
        name = self.rng.choice(BINARY)
        return self.b.op(name, self.off_kink(x) if name in BINARY[3:] else x, self.rng.choice(fitting))

    def view(self) -> Value:
        x = self.pick()
        rank, kind = len(x.shape), self.rng.randrange(3)
        if kind == 0 and rank > 1:
            return self.b.op("permute", x, dims=tuple(self.rng.sample(range(rank), rank)))
        if kind == 1 and rank > 1:
            at = self.rng.randrange(rank - 1)
            merged = x.shape[at] * x.shape[at + 1]
            return self.b.op("reshape", x, shape=(*x.shape[:at], merged, *x.shape[at + 2 :]))
        return self.b.op("expand", x, shape=(2, *x.shape)) if rank < 4 else self.unary()

    def cut(self) -> Value | None:
        x = self.pick()
        if not x.shape:
            return None
        d = self.rng.randrange(len(x.shape))
        n = x.shape[d]
        start, step = self.rng.randrange(n), self.rng.choice([1, 1, 2])
        stop = self.rng.randint(start + 1, n)
        cut = {"dim": d, "start": start, "stop": stop, "step": step}
        v = self.b.op("slice", x, **cut)
        return self.b.op("pad", self.tame(v), size=n, **cut) if self.rng.random() < 0.3 else v

    def total(self) -> Value | None:
        x = self.pick()
        dims = tuple(d for d in range(len(x.shape)) if self.rng.random() < 0.5)
        return self.b.op("sum", self.tame(x), dims=dims)

    def select(self) -> Value:
        x = self.pick()
        return self.b.op("where", self.b.op("step", self.off_kink(x)), self.tame(x), self.b.const(0.25))

    def join(self) -> Value | None:
        x = self.pick()
        if not x.shape or len(x.shape) > 4:
            return None
        return self.b.op("concat", x, self.tame(x), dim=self.rng.randrange(len(x.shape)))

    def product(self) -> Value | None:
        x = self.pick(2, 3)
        y = self.b.op("permute", x, dims=(*range(len(x.shape) - 2), len(x.shape) - 1, len(x.shape) - 2))
        others = [v for v in self.values if v.shape[:-2] == x.shape[:-2] and v.shape[-2:-1] == x.shape[-1:]]
        return self.b.op("matmul", self.tame(x), self.rng.choice([*others, y]))

    def convolve(self) -> Value | None:
        x = self.pick(4)
        kernels = [v for v in self.values if len(v.shape) == 4 and v.shape[1] == x.shape[1]]
        stride, padding = self.rng.choice([1, 1, 2]), self.rng.choice([0, 1])
        kernels = [
            k
            for k in kernels
            if all(n + 2 * padding >= s for n, s in zip(x.shape[2:], k.shape[2:], strict=True))
        ]
        if not kernels:
            return None
        pairs = {"stride": (stride, stride), "padding": (padding, padding), "dilation": (1, 1)}
        return self.b.op("conv2d", self.tame(x), self.tame(self.rng.choice(kernels)), **pairs)

    def pool(self) -> Value | None:
        x = self.pick(4)
        if min(x.shape[2:]) < 2:
            return None
        window = {"kernel": (2, 2), "stride": (2, 2), "padding": (0, 0), "ceil": False}
        if self.rng.random() < 0.5:
            return self.b.op("max_pool", x, dilation=(1, 1), **window)
        return self.b.op("avg_pool", x, count_include_pad=True, divisor=0, **window)

    def normalise(self) -> Value | None:
        x = self.pick(2, 3, 4)
        dims = self.rng.choice([(0, *range(2, len(x.shape))), (len(x.shape) - 1,)])
        if torch.Size([x.shape[d] for d in dims]).numel() < 3:
            return None
        outputs = self.b.ops("standardize", x, dims=dims, eps=0.1)
        self.values.append(outputs[self.rng.randint(1, 3)])
        return outputs[0]

    def softmax(self) -> Value | None:
        x = self.pick(1, 2, 3)
        return self.b.op("log_softmax", x, dim=self.rng.randrange(len(x.shape)))

    def graph(self) -> Graph:
        """The loss, three values, the gradient, and how all that moves along tangents of the arguments."""
        while len(self.values) < 22:
            self.step()
        last = self.values[-8:]
        loss = self.b.const(0.0)
        for v in last:
            loss = self.b.op("add", loss, sum_to(self.b, self.tame(v), ()))
        shown = {f"y{i}": v for i, v in enumerate(self.rng.sample(last, 3))}
        keys = [("arg", str(i)) for i in range(6)]
        gradient = with_gradient(self.b.finish({"loss": loss, **shown}), "loss", keys)
        b = Builder()
        env = copy_into(b, gradient, same_input(b))
        along = {env[i.value]: b.input("dot", i.name, i.value.shape) for i in gradient.inputs}
        moved = push(b, along, [env[v] for v in gradient.outputs.values()])
        outputs = {name: env[v] for name, v in gradient.outputs.items()}
        outputs |= {f"dot {n}": v for n, v in zip(gradient.outputs, moved, strict=True) if v is not None}
        return b.finish(outputs)


@pytest.mark.parametrize("seed", range(40))
def test_random_graphs(seed: int) -> None:
    pytest.importorskip("metafast._C", reason="the native backend is not built", exc_type=ImportError)
    from metafast.native import evaluate as run_native

    graph = Writer(seed).graph()
    draw = torch.Generator().manual_seed(seed)
    values = {
        (i.role, i.name): torch.randn(i.value.shape, generator=draw, dtype=torch.float64)
        for i in graph.inputs
    }
    expected = evaluate(graph, values)
    got = run_native(graph, values)
    for name, e in expected.items():
        error = float((got[name] - e).abs().max())
        assert error <= 1e-9 * max(float(e.abs().max()), 1e-3), (
            f"{name}: {error:.2e} on {float(e.abs().max()):.2e}"
        )
