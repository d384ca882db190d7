"""Runs the sections of a sweep with PyTorch, one node at a time: replay's meaning, without replay."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metafast.graph import evaluate
from metafast.sweep import Section


def interpret(
    sections: Mapping[str, Section],
    leaves: Mapping[str, Tensor],
    per_task: tuple[str, ...],
    tasks: int,
    steps: int,
    weights: Tensor,
) -> dict[tuple[str, str], Tensor]:
    """All stores by (kind, name): gradients of shared leaves summed over tasks, all else with its leading dims."""
    sums: dict[tuple[str, str], Tensor] = {}
    rows: dict[tuple[str, str], dict[tuple[int, int], Tensor]] = {}
    for t in range(tasks):
        state: dict[int, dict[str, Tensor]] = {k: {} for k in range(steps + 1)}
        adjoint: dict[str, Tensor] = {}
        kept: dict[tuple[str, str], Tensor] = {}

        def run(
            name: str,
            k: int,
            t: int = t,
            state: dict[int, dict[str, Tensor]] = state,
            kept: dict[tuple[str, str], Tensor] = kept,
        ) -> None:
            nonlocal adjoint
            section = sections.get(name)
            if section is None:
                return
            call = {"k": float(k), "weight": float(weights[t])}
            values: dict[tuple[str, str], Tensor] = {}
            for i in section.graph.inputs:
                if i.role == "leaf":
                    leaf = leaves[i.name]
                    v = leaf[t] if i.name.startswith(per_task) else leaf
                elif i.role == "state":
                    v = state[k][i.name]
                elif i.role == "adjoint":
                    v = adjoint[i.name]
                elif i.role == "call":
                    v = torch.tensor(call[i.name], dtype=weights.dtype)
                else:
                    v = kept[i.role, i.name]
                values[i.role, i.name] = v
            out = evaluate(section.graph, values)
            following: dict[str, Tensor] = {}
            for s in section.stores:
                v = out[s.output].clone()
                if s.kind == "state":
                    state[k][s.name] = v
                elif s.kind == "state_next":
                    state[k + 1][s.name] = v
                elif s.kind == "adjoint":
                    adjoint[s.name] = v
                elif s.kind == "adjoint_next":
                    following[s.name] = v
                elif s.kind in ("hoisted", "spill"):
                    kept[s.kind, s.name] = kept[s.kind, s.name] + v if s.add else v
                elif s.kind == "gradient" and not s.name.startswith(per_task):
                    sums[s.kind, s.name] = sums[s.kind, s.name] + v if (s.kind, s.name) in sums else v
                else:
                    slot = rows.setdefault((s.kind, s.name), {})
                    at = (t, k if s.kind in ("step_loss", "support_stat") else 0)
                    slot[at] = slot[at] + v if s.add and at in slot else v
            adjoint = following or adjoint

        run("prologue", 0)
        for k in range(steps):
            run("inner", k)
        run("query", steps)
        for k in reversed(range(steps)):
            run("meta", k)
        run("epilogue", 0)
    out = dict(sums)
    out |= {key: torch.stack([v for _, v in sorted(slot.items())]) for key, slot in rows.items()}
    return out
