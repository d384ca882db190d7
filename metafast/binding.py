"""One call of a native program: its tensors bound, run, and what it wrote."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from metafast import _C, settings
from metafast.batchnorm import fold
from metafast.budget import held
from metafast.division import Portion
from metafast.errors import LabelError, message, position
from metafast.lower import External
from metafast.lower.arrays import EXTERNAL, Instruction, dense_strides
from metafast.ops import numel
from metafast.problem import Problem
from metafast.sweep import SECTIONS

if TYPE_CHECKING:
    from metafast.native import Plan

__all__ = ["MOST_FORMS", "Call", "Form"]

LABEL_OUT_OF_RANGE = 1  # a kernel's error codes, csrc/kernels/common/kernels.hpp

MOST_FORMS = 64  # tasks, steps and intervals that a program is kept ready for
_LOSSES = ("loss", "step_loss")


class Form:
    """Programs for so many tasks and steps: where their tensors lie, and how room for what they write is made."""

    def __init__(self, portions: tuple[Portion, ...], problem: Problem, every: int) -> None:
        self.portions, self.dtype, self.steps = portions, problem.parameter.dtype, problem.steps
        self.tasks = sum(portion.tasks for portion in portions)
        tensors = list({(e.kind, e.name): e for portion in portions for e in portion.lowered.externals}.values())
        self._number = {(e.kind, e.name): n for n, e in enumerate(tensors)}
        read, written = ([e for e in tensors if (e.kind == "leaf") is leaf] for leaf in (True, False))
        self.leaves = read
        self.names = [e.name for e in self.leaves]
        self.gradients = [(e.name, (e.kind, e.name)) for e in written if e.kind == "gradient"]
        self.by_step = [(e.kind, e.name) for e in written if e.per_step]
        sums = portions[0].lowered.sums
        assert all(portion.lowered.sums == sums for portion in portions)  # they add up in the same place
        self.sums = tuple(sorted(sums, key=problem.wrt.index))
        self.binding = _C.Binding(
            self._placed(),
            self.steps,
            [(self._number[e.kind, e.name], self.read_as(e)) for e in read],
            [self._room(e) for e in written],
            [(key, *sums[key], dense_strides(sums[key][1])) for key in self.sums],
            any(e.kind == "loss" for e in written),
            every,
        )

    @classmethod
    def of(cls, portions: tuple[Portion, ...], problem: Problem) -> Form:
        """The one kept with the first program, which keeps the last few."""
        forms: dict[Any, Form] = portions[0].lowered.forms
        every = 1 if problem.memory_budget is None else held(portions, problem).every
        key = (portions, problem.steps, every)
        found = forms.get(key)
        if found is None:
            if len(forms) >= MOST_FORMS:
                forms.clear()
            found = forms[key] = cls(portions, problem, every)
        return found

    def _placed(self) -> list[tuple[Any, int, list[tuple[int, int, int, int]]]]:
        """Each program, how often it runs, and where its externals lie in the tensors."""
        first, rows = 0, []
        for portion in self.portions:
            externals = [self._place(e, first, portion.lowered.lanes) for e in portion.lowered.externals]
            rows.append((portion.lowered.program, portion.blocks, externals))
            first += portion.tasks
        return rows

    def _place(self, e: External, first: int, lanes: int) -> tuple[int, int, int, int]:
        """Its tensor; in bytes, where the first task's lies, and from one block of tasks, and one step, to the next."""
        size = numel(e.shape) * self.read_as(e).itemsize
        each, step = size if e.per_task else 0, size * self.tasks if e.per_step else 0
        if e.step is not None:  # the section of all steps runs once
            return self._number[e.kind, e.name], first * each + e.step * step, lanes * each, 0
        return self._number[e.kind, e.name], first * each, lanes * each, step

    def read_as(self, e: External) -> torch.dtype:
        """The dtype in which the program reads a tensor."""
        return torch.int64 if e.dtype == "int" else self.dtype

    def _looked(self, e: External) -> tuple[int, int]:
        """How many numbers of a loss are to be finite; how many make up the sum over tasks."""
        every = self.tasks * (self.steps if e.per_step else 1)
        return every if e.kind in _LOSSES else 0, self.tasks if e.kind == "loss" else 0

    def _room(self, e: External) -> tuple[tuple[str, str], int, tuple[int, ...], tuple[int, ...], bool, int, int]:
        """A tensor that the program writes task by task, as `Binding` has it."""
        shape, strides = self._lies(e)
        return (e.kind, e.name), self._number[e.kind, e.name], shape, strides, e.kind == "gradient", *self._looked(e)

    def _lies(self, e: External) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shape and strides: `(T, ...)`, or `(T, steps, ...)` where each step writes, steps outermost in memory."""
        if not e.per_step:
            shape = (self.tasks, *e.shape)
            return shape, dense_strides(shape)
        size = numel(e.shape)
        shape = (self.tasks, max(self.steps, 1), *e.shape)  # a step that is not made has a place to write to
        return shape, (size, size * self.tasks, *dense_strides(e.shape))


class Call:
    """The tensors of one call, and what it made of them."""

    def __init__(self, plan: Plan, form: Form, problem: Problem, extra: Mapping[str, Tensor] | None = None) -> None:
        self.plan, self.form, self.problem = plan, form, problem
        leaves = {**problem.leaves, **extra} if extra else problem.leaves
        self.given = [leaves[name] if name in leaves else self._held(name) for name in form.names]
        self.made: dict[tuple[str, str], Tensor] = {}
        self.sums: dict[str, Tensor | None] = {}
        self._copied: set[int] = set()
        self.finite = True  # the losses
        self.total: Tensor | None = None  # of them

    def _held(self, name: str) -> Tensor:
        """A buffer of the model, or a tensor that the plan found in a closure."""
        kind, _, rest = name.partition("/")
        return self.problem.buffers[rest] if kind == "buffer" else self.plan.externs[name]

    def _readable(self, n: int) -> Tensor:
        """A tensor as the program reads it: contiguous, labels as int64, all else in its dtype."""
        leaf = self.given[n].detach().resolve_neg()
        return leaf.to(self.form.read_as(self.form.leaves[n])).contiguous()

    def _weights(self, weights: Tensor | None) -> Tensor | None:
        """The weight of every task as the program reads it."""
        if weights is None or (weights.dtype is self.form.dtype and weights.is_contiguous()):
            return weights
        return weights.detach().to(self.form.dtype).contiguous()

    def run(self, weights: Tensor | None) -> tuple[int, int, int, str, int] | None:
        """Replay. Returns None, or where it failed the status, task, step, section and instruction."""
        form, reduction, threads = self.form, self.problem.reduction, torch.get_num_threads()
        weights, divisor = self._weights(weights), form.tasks if reduction == "mean" else 1
        while isinstance(found := form.binding.run(self.given, weights, divisor, threads, reduction == "none"), int):
            self._copy(found)
        failed, self.made, self.sums, self.finite, self.total = found
        if not form.steps:
            self.made |= {key: self.made[key][:, :0] for key in form.by_step if key in self.made}
        return failed

    def ready(self, weights: Tensor) -> Any:
        """What makes this call again over the tensors of another problem of its form; None where one had to be copied,
        or a gradient is no sum."""
        form, problem = self.form, self.problem
        if self._copied or form.sums != problem.wrt:
            return None
        number = {key: n for n, key in enumerate([*problem.leaves, *("buffer/" + name for name in problem.buffers)])}
        picks = [number[name] if name in number else self.plan.externs[name] for name in form.names]
        threads = torch.get_num_threads()
        divisor = form.tasks if problem.reduction == "mean" else 1
        return _C.Ready(form.binding, picks, self._weights(weights), divisor, threads, _C.Places(settings.places(), []))

    def profile(self, weights: Tensor) -> list[list[tuple[str, int, str, int, float]]]:
        """Replay on one thread: by program section, index, kernel, calls and seconds of every instruction."""
        ready = self._weights(weights)
        while isinstance(found := self.form.binding.profile(self.given, ready), int):
            self._copy(found)
        return found

    def _copy(self, n: int) -> None:
        """Put a copy in place of a tensor that no kernel may read where it lies."""
        if n in self._copied:
            raise RuntimeError(f"{self.form.names[n]}: a copy cannot be read either; please report it")
        self._copied.add(n)
        self.given[n] = self._readable(n)

    def fail(self, status: int, task: int, step: int, section: Any, instruction: int) -> None:
        name = section if isinstance(section, str) else SECTIONS[section]
        (portion,) = self.form.portions  # where there are more, or more lanes, the call was made again, one task by one
        code = portion.lowered.code[name][instruction]
        if status == LABEL_OUT_OF_RANGE:
            part = "query" if name == "query" else "support"
            where = f"task {task}, {part} labels, {code.note.partition('  ')[2] or 'loss'}: label out of range"
            way_out = "number the classes of each task from 0, or widen the model's output"
            raise LabelError(message(where, self._wrong_label(code, task), f"0..{code.ints[1] - 1}", way_out))
        raise RuntimeError(f"{position(task, step, self.problem.steps)}: kernel {code.kernel} failed with {status}")

    def _wrong_label(self, code: Instruction, task: int) -> str:
        """The label that a kernel refused, where it is one of the batch and not computed."""
        space = code.operands[0].buffer.space
        e = (
            self.form.portions[0].lowered.externals[space - EXTERNAL]
            if space is not None and space >= EXTERNAL
            else None
        )
        if e is not None and e.per_task:
            labels = self.given[self.form.leaves.index(e)][task]
            lowest = -code.ints[1] if code.ints[5] else 0
            wrong = labels[((labels < lowest) | (labels >= code.ints[1])) & (labels != code.ints[2])]
            if len(wrong):
                return f"label {int(wrong[0])}"
        return "a computed label"

    def fold(self) -> None:
        """Fold the batch statistics of every BatchNorm pass into the running ones, in the order of the eager loop."""
        passes: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for part, stats in (("support", self.plan.support_stats), ("query", self.plan.query_stats)):
            for path, calls in itertools.groupby(sorted(stats, key=lambda s: s.path), key=lambda s: s.path):
                pairs = [self._unbiased(part, s) for s in calls]
                if pairs[0] is not None:
                    mean, var = (torch.stack(side, -2).flatten(1, -2) for side in zip(*pairs, strict=True))
                    passes.setdefault(path, []).append((mean, var))
        for path, parts in passes.items():
            mean, var = (torch.cat(side, 1).flatten(0, 1) for side in zip(*parts, strict=True))
            fold(cast(_NormBase, self.problem.model.get_submodule(path)), mean, var)

    def _unbiased(self, part: str, stat: Any) -> tuple[Tensor, Tensor] | None:
        """Mean and unbiased variance of one recorded pass, (T, steps, C) or (T, C); None where it did not run."""
        mean = self.made.get((f"{part}_stat", f"{stat.output}/mean"))
        if mean is None:
            return None
        scale = stat.count / (stat.count - 1) if stat.count > 1 else float("nan")
        return mean, self.made[f"{part}_stat", f"{stat.output}/var"] * scale

    def gradients(self, wanted: Sequence[str]) -> dict[str, Tensor | None]:
        """The gradient of every wanted leaf; None where nothing depends on it."""
        if self.form.sums == wanted:
            return self.sums
        out = {**dict.fromkeys(wanted), **self.sums}
        for name, key in self.form.gradients:
            out[name] = self.made[key]
        return out
