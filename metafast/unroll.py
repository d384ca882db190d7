"""All sections of a few steps as one: what a step reads of another is then a value of one graph.

Nothing is stored between steps any more, what the way back would compute again is there, and what holds of all steps
together shows: that fast weights are the initial ones less a sum of thin products (thin.py). The price is code and
memory for every step, so that it is for few steps, where something is gained (`Plan.unrolled` decides).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from metafast.graph import Builder, Input, Value, copy_into
from metafast.sweep import Section, Store

__all__ = ["unrolled"]


def unrolled(sections: Mapping[str, Section], steps: int) -> Section:
    """The sections of a sweep, written one after the other for so many steps, as one section."""
    writer, states = _Unroller(), []
    writer.write(sections["prologue"], {})
    for k in range(steps):
        states.append({key: value for key, value in writer.held.items() if key[0] == "state"})
        writer.write(sections["inner"], {"k": writer.b.const(float(k))}, k)
    writer.write(sections["query"], {"k": writer.b.const(float(steps))})
    for k in reversed(range(steps)) if "meta" in sections else ():
        writer.held.update(states[k])
        writer.write(sections["meta"], {"k": writer.b.const(float(k))}, k)
    if "epilogue" in sections:
        writer.write(sections["epilogue"], {"k": writer.b.const(0.0)})
    return writer.finish()


_CROSSING = {"state_next": "state", "adjoint_next": "adjoint"}  # what the next section reads under another name
_HELD = ("state", "adjoint", "hoisted", "spill")


@dataclass
class _Unroller:
    b: Builder = field(default_factory=Builder)
    held: dict[tuple[str, str], Value] = field(default_factory=dict)
    sums: dict[str, Value] = field(default_factory=dict)
    outputs: dict[str, Value] = field(default_factory=dict)
    stores: list[Store] = field(default_factory=list)

    def write(self, section: Section, call: Mapping[str, Value], step: int | None = None) -> None:
        """Append a section. Its inputs are what was held before it, its stores are held after it."""

        def bind(i: Input) -> Value:
            if i.role in _HELD:
                return self.held[i.role, i.name]
            if i.role == "call" and i.name in call:
                return call[i.name]
            return self.b.same(i.role, i.name, i.value)

        env = copy_into(self.b, section.graph, bind)
        made = [(store, env[section.graph.outputs[store.output]]) for store in section.stores]
        for store, value in made:
            self._store(store, value, step)

    def _store(self, store: Store, value: Value, step: int | None) -> None:
        kind = _CROSSING.get(store.kind, store.kind)
        if kind in _HELD:
            old = self.held.get((kind, store.name)) if store.add else None
            self.held[kind, store.name] = value if old is None else self.b.op("add", old, value)
        elif kind == "gradient":
            old = self.sums.get(store.name)
            self.sums[store.name] = value if old is None else self.b.op("add", old, value)
        else:
            key = f"{kind}:{store.name}" if step is None else f"{kind}:{store.name}:{step}"
            self.outputs[key] = value
            self.stores.append(Store(key, kind, store.name, store.add, step))

    def finish(self) -> Section:
        for name, value in self.sums.items():
            self.outputs[f"gradient:{name}"] = value
            self.stores.append(Store(f"gradient:{name}", "gradient", name, add=True))
        return Section(self.b.finish(self.outputs), tuple(self.stores))
