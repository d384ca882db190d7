"""One op followed through every stage: the printed text in ARCHITECTURE.md.

`python -m docs.walkthrough` prints the stages; `python -m docs.walkthrough ARCHITECTURE.md` puts each into the block
that stands under its marker, `<!-- walkthrough: NAME -->`.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metafast
from metafast.differentiate import with_gradient
from metafast.native import captured, make_plan
from metafast.sweep import Section

TASKS, STEPS = 2, 3
Batch = tuple[Tensor, Tensor]


def example() -> tuple[metafast.InnerLoop, Batch, Batch]:
    """A linear layer and tanh, float64, with weights and data that need no random numbers."""
    model = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Tanh()).double()
    nn.init.eye_(model[0].weight)
    inner = metafast.InnerLoop(model, F.mse_loss, update=metafast.SGD(lr=0.5), steps=STEPS, backend="native")
    x = torch.linspace(-1, 1, TASKS * 9 * 3, dtype=torch.float64).reshape(TASKS, 9, 3).cos()
    y = torch.stack([x[..., 0] * x[..., 1], x[..., 2].square()], -1)
    return inner, (x[:, :4], y[:, :4]), (x[:, 4:], y[:, 4:])


def stages() -> dict[str, str]:
    """The text of each stage, by name."""
    inner, support, query = example()
    problem = inner._problem(support, query, gradient=True)[0]
    traces = captured(problem)
    plan = make_plan(problem, traces)
    lowered = plan.program("fused", STEPS)
    sections = plan.sections("fused", STEPS)
    graph, gradient = str(plan.loop.support), with_gradient(plan.loop.support, "loss", [("param", "0.weight")])
    return {
        "capture": str(traces["support"]),
        "normalise": graph,
        "differentiate": _added(str(gradient), graph),
        "sweep": "\n".join(_interface(name, section) for name, section in sections.items()),
        "tangent": "\n".join(line for line in str(sections["meta"].graph).splitlines() if line.endswith("# 1")),
        "lower": _listed(lowered.listing(), ("inner", "meta")),
        "replay": _replayed(inner, support, query),
    }


def _added(text: str, before: str) -> str:
    """The lines of `text` that are not in `before`; the rest must be there in its order."""
    old = before.splitlines()
    lines = text.splitlines()
    assert [line for line in lines if line in old] == old, "the gradient keeps the lines of the loss"
    return "\n".join(line for line in lines if line not in old)


def _interface(name: str, section: Section) -> str:
    reads = ", ".join(f"{i.role} {i.name}" for i in section.graph.inputs)
    writes = ", ".join(f"{s.kind} {s.name}{' (added)' if s.add else ''}" for s in section.stores)
    return f"  {name}, {len(section.graph.nodes)} nodes\n    reads   {reads}\n    writes  {writes}"


def _listed(listing: str, names: tuple[str, ...]) -> str:
    """Those sections of a program's listing: a section is its heading and the indented lines below it."""
    return "\n".join(part for part in re.split(r"\n(?=\S)", listing) if part.startswith(names))


def _replayed(inner: metafast.InnerLoop, support: Batch, query: Batch) -> str:
    lines = []
    for backend in ("native", "torch"):
        inner.backend = backend
        loss, gradients = inner.meta_gradient(support, query)
        (name, gradient), *_ = gradients.items()
        numbers = " ".join(f"{g:+.6f}" for g in gradient.flatten().tolist())
        lines.append(f"  {backend:<7} loss {loss:.6f}   {name} {numbers}")
    return "\n".join(lines)


def fill(document: str, texts: dict[str, str]) -> str:
    """The document with each text in its block; a text without exactly one block raises ValueError."""
    for name, text in texts.items():
        block = re.compile(rf"(<!-- walkthrough: {name} -->\n```text\n).*?(?=```)", re.DOTALL)
        document, count = block.subn(lambda m, text=text: f"{m[1]}{text}\n", document)
        if count != 1:
            raise ValueError(f"document: got {count} blocks for {name!r}, expected one under its marker")
    return document


def main() -> None:
    """Print the stages, or put them into a file."""
    parser = argparse.ArgumentParser(prog="python -m docs.walkthrough", description=__doc__.splitlines()[0])
    parser.add_argument("document", type=Path, nargs="?")
    given = parser.parse_args()
    texts = stages()
    if given.document is None:
        print("\n\n".join(f"{name}:\n{text}" for name, text in texts.items()))
    else:
        given.document.write_text(fill(given.document.read_text(), texts))


if __name__ == "__main__":
    main()
