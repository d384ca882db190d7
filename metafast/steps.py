"""What plans that differ in their query alone have in common: every section but `query`, written and lowered once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from metafast.graph import form
from metafast.keep import keep
from metafast.lower import Prepared
from metafast.ops import numel
from metafast.passes import left_out
from metafast.sweep import Loop, Section, Sweep

MOST_KEPT_BYTES = 1 << 18  # half of a second-level cache
LITTLE = 4  # what a step keeps is little beside a state that has so many times its elements
MOST_LITTLE_BYTES = 1 << 22  # a worker's share of the last cache: memory in K is that of states, and no more than this


class Steps:
    """The way there and back of a loop. `form` is equal for loops that differ in the query alone."""

    def __init__(self, loop: Loop, dtype: torch.dtype, form: Any) -> None:
        self.form, self.dtype = form, dtype
        self._sweep = Sweep(replace(loop, query=None))
        self.state = self._sweep.state
        self._written: dict[bool, tuple[dict[str, Section], dict[str, Section], int]] = {}
        self._prepared: dict[tuple[bool, int, bool], Prepared] = {}

    def sections(self, back: bool, keeps: bool) -> dict[str, Section]:
        """All sections but `query`, with `back` those of the way back; `keeps` as of `keeps`."""
        plain, kept, _ = self._pair(back)
        return kept if keeps else plain

    def keeps(self, back: bool, steps: int, lanes: int) -> bool:
        """Whether steps keep products for their way back: if those of all steps lie in the second-level cache, or if
        they are little beside the states, which have to be written and read as well, and lie in the last one."""
        elements = self._pair(back)[2] if steps else 0
        little = LITTLE * elements <= sum(map(numel, self.state.values()))
        nbytes = (steps + 1) * elements * lanes * self.dtype.itemsize
        return 0 < nbytes <= (MOST_LITTLE_BYTES if little else MOST_KEPT_BYTES)

    def prepared(self, back: bool, lanes: int, keeps: bool) -> Prepared:
        """Those sections, lowered for so many tasks at once. Raises NotInterleaved where that can't be."""
        key = (back, lanes, keeps)
        if key not in self._prepared:
            self._prepared[key] = Prepared(self.state, self.sections(back, keeps), self.dtype, lanes)
        return self._prepared[key]

    def _pair(self, back: bool) -> tuple[dict[str, Section], dict[str, Section], int]:
        """The sections, those that keep products, and how many elements of them a step keeps."""
        if back not in self._written:
            plain = self._sweep.around(back)
            self._written[back] = (plain, *keep(plain))
        return self._written[back]


def steps_of(loop: Loop, dtype: torch.dtype, known: Iterable[Steps]) -> Steps:
    """The steps of a loop: those that are `known`, where they are the same."""
    form = _form(loop, dtype)
    return next((steps for steps in known if steps.form == form), None) or Steps(loop, dtype, form)


def _form(loop: Loop, dtype: torch.dtype) -> Any:
    """A hashable value, equal for loops of one dtype, made with the same passes, that differ in the query alone."""
    graphs = tuple(map(form, (loop.support, loop.update, loop.init)))
    wanted = tuple([key for key in loop.wrt if not key.startswith("query/")])
    return (dtype, left_out(), graphs, loop.adapted, tuple(loop.shapes.items()), wanted, loop.order)
