"""Captures of small nets on fixed numbers, and what the eager loss says to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metafast.capture import Trace, capture
from metafast.graph import Graph, evaluate
from metafast.normalise import normalise

F64 = torch.float64


def run(model: nn.Module, objective: Callable[..., Any], *batch: Tensor, **more: Any) -> Trace:
    params = dict(model.named_parameters())
    keys = [f"support/{i}" for i in range(len(batch))]
    return capture(model, objective, params, dict(model.named_buffers()), batch, keys, **more)


def ordinary(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x), y)


def squared(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0]).square().mean()


def data() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.randn(6, 4, dtype=F64, generator=g), torch.tensor([0, 1, 2, 0, 1, 2])


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(F64)


def values(graph: Graph, model: nn.Module, trace: Trace, batch: Any) -> dict[tuple[str, str], Tensor]:
    """The numbers for a graph's inputs, from where a backend would take them."""
    tensors = {f"param/{n}": p for n, p in model.named_parameters()}
    tensors |= {f"buffer/{n}": b for n, b in model.named_buffers()}
    tensors |= {f"support/{i}": t for i, t in enumerate(batch)} | dict(trace.externs)
    return {(i.role, i.name): tensors[f"{i.role}/{i.name}"].detach() for i in graph.inputs}


def check(model: nn.Module, objective: Callable[..., Any], *batch: Tensor) -> Graph:
    """Capture on these numbers; the graph gives the eager loss."""
    trace = run(model, objective, *batch)
    graph = normalise(trace)
    got = evaluate(graph, values(graph, model, trace, batch))
    result = objective(model, batch)
    loss = result[0] if isinstance(result, tuple) else result
    torch.testing.assert_close(got["loss"], loss.detach(), rtol=1e-12, atol=1e-12)
    assert trace.loss is not None
    torch.testing.assert_close(trace.loss, loss.detach(), rtol=1e-14, atol=0)
    return graph
