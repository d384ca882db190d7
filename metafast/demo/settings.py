"""What `metafast demo` trains, with the defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """What to train. The defaults are those of `metafast demo`; `tasks` are per outer step, `queries` per letter."""

    steps: int = 400
    ways: int = 5
    shots: int = 1
    queries: int = 5
    tasks: int = 4
    inner_steps: int = 1
    order: int = 2
    inner_lr: float = 0.1
    outer_lr: float = 3e-3
    filters: int = 32
    test_tasks: int = 600
    seed: int = 0
    backend: str = "auto"
    reference: bool = True

    def __post_init__(self) -> None:
        least = {"steps": 1, "ways": 2, "shots": 1, "queries": 1, "tasks": 1, "inner_steps": 0, "filters": 1}
        for name, bound in (least | {"test_tasks": 2, "seed": 0}).items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected {bound} or more")
        if self.order not in (1, 2):
            raise ValueError(f"order: got {self.order}, expected 1 (gradients held constant) or 2")
        for name in ("inner_lr", "outer_lr"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}: got {value}, expected a positive number")
