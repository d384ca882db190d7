"""What plans that differ in their query alone share, and what they must not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metafast
from metafast import dispatch
from metafast.graph import Builder, form

pytest.importorskip("metafast._C", reason="the native backend is not built", exc_type=ImportError)

T = 3


def batch(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return (
        torch.randn(T, rows, 4, generator=draw, dtype=torch.float64),
        torch.randn(T, rows, 2, generator=draw, dtype=torch.float64),
    )


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def loop(model: nn.Module, backend: str = "native", **options: object) -> metafast.InnerLoop:
    given = {"update": metafast.SGD(lr=0.1), "steps": 2} | options
    return metafast.InnerLoop(model, F.mse_loss, backend=backend, **given)  # type: ignore[arg-type]


def assert_as_reference(model: nn.Module, inner: metafast.InnerLoop, support: object, query: object) -> None:
    eager = metafast.InnerLoop(model, F.mse_loss, update=inner.update, steps=inner.steps, backend="torch")
    (loss, grads), (wanted, wants) = inner.meta_gradient(support, query), eager.meta_gradient(support, query)
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(dict(grads), dict(wants), rtol=1e-9, atol=1e-12)


def plans(model: nn.Module) -> list[object]:
    return [choice.backend.plan for choice in dispatch._plans[model].values()]  # type: ignore[attr-defined]


def test_queries_of_other_shapes_share_the_steps() -> None:
    model = net()
    inner = loop(model)
    for rows in (5, 7, 1, 30):
        assert_as_reference(model, inner, batch(5), batch(rows, seed=rows))
    made = [p for p in plans(model) if p.programs]  # type: ignore[attr-defined]
    assert len(made) == 4 and len({id(p.steps) for p in made}) == 1  # type: ignore[attr-defined]


def test_supports_of_other_shapes_do_not() -> None:
    model = net()
    inner = loop(model)
    for rows in (5, 6):
        assert_as_reference(model, inner, batch(rows), batch(7))
    assert len({id(p.steps) for p in plans(model) if p.programs}) == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("other", [{"order": 1}, {"params": "2.*"}], ids=str)
def test_other_loops_do_not(other: dict[str, object]) -> None:
    model = net()
    for options, rows in (({}, 7), (other, 8)):
        loop(model, **options).meta_gradient(batch(5), batch(rows))
    assert len({id(p.steps) for p in plans(model)}) == 2  # type: ignore[attr-defined]


def test_every_way_to_run_shares_them() -> None:
    """The program of a way is that of any other but for the query: the results are those of one alone."""
    model = net()
    inner, alone = loop(model), [loop(net()) for _ in range(3)]
    support, query = batch(5), batch(7)
    with torch.no_grad():
        forward = inner(support, query)
        assert torch.equal(forward, alone[0](support, query))
    grads = inner.meta_gradient(support, query)[1]
    for name, grad in alone[1].meta_gradient(support, query)[1].items():
        assert torch.equal(grad, grads[name])
    for name, fast in alone[2].adapt(support).items():
        assert torch.equal(fast, inner.adapt(support)[name])


def test_a_tensor_that_replaces_another_is_read() -> None:
    """Two plans share their steps, and each reads what its own closure holds."""
    model, held = net(), [torch.tensor(1.0, dtype=torch.float64)]

    def objective(module: nn.Module, given: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(module(given[0]) * held[0], given[1])

    def both() -> list[metafast.InnerLoop]:
        update = metafast.SGD(lr=0.1)
        return [
            metafast.InnerLoop(model, objective=objective, update=update, steps=1, backend=backend)
            for backend in ("native", "torch")
        ]

    native, eager = both()
    for value, rows in ((1.0, 5), (2.0, 6), (3.0, 7)):
        held[0] = torch.tensor(value, dtype=torch.float64)
        torch.testing.assert_close(
            native.meta_gradient(batch(4), batch(rows))[0], eager.meta_gradient(batch(4), batch(rows))[0]
        )


def written(make: Callable[[Builder], object]) -> object:
    b = Builder()
    return form(b.finish({"out": make(b)}))  # type: ignore[dict-item]


def test_forms() -> None:
    """Equal for the same graph written twice; not for another attribute, input, order, or sign of zero."""

    def half(b: Builder, *, name: str = "x", factor: float = 0.5, swapped: bool = False) -> object:
        x, y = b.input("leaf", name, (3,)), b.input("leaf", "y", (3,))
        scaled = b.op("mul", x, b.const(factor))
        return b.op("sub", y, scaled) if swapped else b.op("sub", scaled, y)

    plain = written(half)
    assert plain == written(half) and hash(plain) == hash(written(half))
    for other in ({"name": "z"}, {"factor": 0.25}, {"swapped": True}):
        assert plain != written(lambda b, other=other: half(b, **other))  # type: ignore[misc]
    zero, minus = (written(lambda b, v=v: b.op("div", b.input("leaf", "x", ()), b.const(v))) for v in (0.0, -0.0))
    assert zero != minus


def test_zeros_of_both_signs_stay_apart() -> None:
    b = Builder()
    assert b.const(0.0) is b.const(0.0) and b.const(0.0) is not b.const(-0.0)
