"""Arithmetic of one meta-gradient, counted from the shapes as direct algorithms.

Only products count (linear and convolution, 2 operations a multiply-add): pointwise work, normalisation and
the update are left out, and nothing is counted twice, recomputation included. An implementation with fewer
operations than the direct algorithm (Winograd) may therefore go above the roof, and one that recomputes
pays for it. With F the operations of one product over a layer's rows:

    gradient            F forward + F for the weight + F for the input
    tangent (order 2)   x·Ẇ + ẋ·W,  xᵀ·dẏ + ẋᵀ·dy,  dẏ·W + dy·Ẇ: 6 F

The first layer has no gradient for its input and no tangent of it: 2 F each. Where only the head adapts,
the body runs forward once on the support set and, in order 2, backward once.
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.workloads import Workload


@dataclass(frozen=True)
class Product:
    """A layer's product: operations a row, whether it is the first layer, whether its weight adapts."""

    flops: int
    first: bool
    adapts: bool


def products(w: Workload) -> list[Product]:
    """The net's products in order, with the sizes its pools leave."""
    side = w.features[-1]
    found: list[Product] = []
    for layer in w.layers:
        if layer.kind == "pool":
            side //= 2
        elif layer.kind in ("linear", "conv"):
            area = 9 * side * side if layer.kind == "conv" else 1
            found.append(
                Product(2 * layer.fan_in * layer.fan_out * area, not found, w.adapts(f"{layer.name}.weight"))
            )
    return found


def _gradient(p: Product) -> int:
    """Forward and both gradients, for the query loss: every parameter gets one."""
    return p.flops * (2 if p.first else 3)


def _inner(p: Product, below_adapts: bool) -> int:
    """One support gradient: the input's gradient only where something below adapts."""
    return p.flops * (3 if below_adapts else 2)


def _tangent(p: Product, below_adapts: bool) -> int:
    """One product of the second derivative with a vector, the mixed term with what lies below included."""
    if p.first:
        return 2 * p.flops
    return p.flops * (6 if below_adapts else 4)


def count(w: Workload) -> int:
    """Floating-point operations of one meta-gradient over all tasks."""
    per_step = once = query = 0
    below_adapts = False
    for p in products(w):
        query += _gradient(p)
        if p.adapts or below_adapts:
            per_step += _inner(p, below_adapts) + (_tangent(p, below_adapts) if w.order == 2 else 0)
        elif w.steps:
            once += p.flops + (_gradient(p) - p.flops if w.order == 2 else 0)
        below_adapts |= p.adapts
    return w.tasks * (w.support * (w.steps * per_step + once) + w.query * query)
