"""The walk over a Trace: what each tensor holds now, call by call.

A *cell* is one tensor. It holds a Value of the Graph, or a real tensor where everything it was made of is constant
(those are simply computed), or the error that its making met: raised only if an output needs it, so that a dead
unsupported op costs nothing. A view's cell has a parent and the view between them; writing through it rewrites the
parent, and a view whose parent has changed is derived anew. That is all of functionalisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metafast.capture import Call, OpInfo, Ref, TensorInfo, Trace, Unsupported, op_info
from metafast.graph import Builder, Graph, GraphError, Value
from metafast.normalise.table import RULES, Context, NeedsReal
from metafast.normalise.views import Stop, View, past_autograd, views_of

Content = Any  # Value | Tensor | Unsupported


def normalise(trace: Trace, *, outputs: bool = True) -> Graph:
    """Write a trace as a Graph.

    **Arguments**: `outputs`, whether what the objective returned beside the loss is wanted. **Returns** a Graph with
    an input of role `param`, `buffer`, `support`, `extern`... for each leaf that is read, and outputs "loss",
    "output/<i>", "stat/<module path>/<call>/mean" and ".../var" (or, of an update rule, its own names). Labels stay
    "int"; boolean inputs, and integer ones that are computed with, are declared "real": the caller converts them.
    **Raises** `Unsupported`, which names the op, the module path and the user's line.
    """
    as_real: set[str] = set()
    while True:
        try:
            return _Rewriter(trace, as_real).run(outputs)
        except NeedsReal as error:
            if error.key in as_real:
                raise
            as_real.add(error.key)


class _Cell:
    """One tensor: its content, and where it comes from if it is a view."""

    __slots__ = ("content", "parent", "seen", "view")

    def __init__(self, content: Content, parent: _Cell | None = None, view: View | None = None) -> None:
        self.content = content
        self.parent = parent
        self.view = view
        self.seen = parent.content if parent is not None else None


@dataclass(frozen=True)
class _Unknown(View):
    """A view that has no native form."""

    error: Unsupported

    def get(self, b: Builder, v: Value) -> Value:
        raise self.error

    def of_tensor(self, t: Tensor) -> Tensor:
        raise self.error


class _Rewriter:
    """One walk over one trace."""

    def __init__(self, trace: Trace, as_real: set[str]) -> None:
        self.trace = trace
        self.as_real = as_real
        self.b = Builder()
        self.c = Context(self.b, {})
        self.cells: dict[int, _Cell] = {}

    def run(self, outputs: bool) -> Graph:
        for position, call in enumerate(self.trace.calls):
            self.c.call, self.c.position = call, position
            self.b.origin = str(call.origin)
            self.c.out = [self.trace.tensors[r.id] for r in _refs(call.outputs)]
            self.c.args = [self.trace.tensors[a.id] if isinstance(a, Ref) else None for a in call.args]
            self._step(call)
        self.b.origin = ""
        made: dict[str, Value] = {}
        self.c.call = Call("return", None, (), {}, None, True, "")  # type: ignore[arg-type]
        if self.trace.loss_ref is not None:
            made["loss"] = self._output(self.trace.loss_ref)
        if outputs or self.trace.loss_ref is None:
            made |= {name: self._output(ref) for name, ref in self.trace.outputs.items()}
        for stat in self.trace.stats:
            if stat.position in self.c.stats:
                mean, var = self.c.stats[stat.position]
                made |= {f"{stat.output}/mean": mean, f"{stat.output}/var": var}
            else:
                self._raise_for(stat.position)
        return self.b.finish(made)

    def _raise_for(self, position: int) -> None:
        """A BatchNorm pass that was not rewritten: raise what stood in its way."""
        self._output(_refs(self.trace.calls[position].outputs)[0])

    def _output(self, ref: Ref) -> Value:
        info = self.trace.tensors[ref.id]
        value = self.c.real(self._content(ref))
        if info.dtype.is_floating_point and info.dtype != self.trace.dtype:
            raise Unsupported("return", "", f"a result is {info.dtype}, the parameters are {self.trace.dtype}")
        return value

    # -- cells

    def _cell(self, ref: Ref) -> _Cell:
        cell = self.cells.get(ref.id)
        if cell is None:
            cell = self.cells[ref.id] = _Cell(self._leaf(self.trace.tensors[ref.id]))
        return cell

    def _leaf(self, info: TensorInfo) -> Content:
        if info.literal is not None:
            return info.literal.clone()
        assert info.key is not None, "a tensor that no call made is a leaf"
        role, _, name = info.key.partition("/")
        if info.dtype.is_complex or (info.dtype.is_floating_point and info.dtype != self.trace.dtype):
            return Unsupported(info.key, "", f"it is {info.dtype}, the parameters are {self.trace.dtype}")
        whole = not info.dtype.is_floating_point and info.dtype != torch.bool and info.key not in self.as_real
        value = self.b.input(role, name, info.shape, "int" if whole else "real")
        if whole:
            self.c.keys[value] = info.key
        return value

    def _read(self, cell: _Cell) -> Content:
        if cell.parent is not None:
            now = self._read(cell.parent)
            if now is not cell.seen:
                assert cell.view is not None
                cell.content = self._through(cell.view, now)
                cell.seen = now
        return cell.content

    def _through(self, view: View, content: Content) -> Content:
        if isinstance(content, Unsupported):
            return content
        return view.of_tensor(content) if isinstance(content, Tensor) else view.get(self.b, content)

    def _content(self, ref: Ref) -> Content:
        """What the tensor holds; raises what its making met."""
        content = self._read(self._cell(ref))
        if isinstance(content, Unsupported):
            raise content
        return content

    def _write(self, cell: _Cell, new: Content) -> None:
        if cell.parent is None:
            cell.content = new
            return
        assert cell.view is not None
        parent = self._read(cell.parent)
        if isinstance(new, Unsupported) or isinstance(parent, Unsupported):
            whole = new if isinstance(new, Unsupported) else parent
        else:
            whole = cell.view.put(self.c, self.c.real(parent), new)
        self._write(cell.parent, whole)
        cell.content, cell.seen = new, self._read(cell.parent)

    # -- calls

    def _step(self, call: Call) -> None:
        info = op_info(call.func) if call.func is not None else None
        try:
            if info is not None and info.view:
                self._view(call, info)
            elif info is not None and info.writes:
                self._in_place(call, info)
            else:
                self._compute(call, info)
        except Unsupported as error:
            self._poison(call, info, error)
        except (NotImplementedError, ValueError, TypeError, GraphError) as error:
            reason = f"metafast's rule for it does not cover this use ({error})"
            self._poison(call, info, Unsupported(call.op, call.origin, reason))

    def _poison(self, call: Call, info: OpInfo | None, error: Unsupported) -> None:
        for ref in _written(call, info):
            self._write(self._cell(ref), error)
        base = call.args[0] if info is not None and info.view else None
        for ref in _refs(call.outputs):
            if ref.id not in self.cells:  # what is written to a view reaches what it views
                seen = (self._cell(base), _Unknown(error)) if isinstance(base, Ref) else ()
                self.cells[ref.id] = _Cell(error, *seen)

    def _arguments(self, call: Call) -> tuple[list[Any], dict[str, Any], bool]:
        """The arguments with what tensors hold, and whether all of that is constant."""
        contents: list[Content] = []

        def held(x: Any) -> Any:
            if isinstance(x, Ref):
                contents.append(self._content(x))
                return contents[-1]
            return [held(e) for e in x] if isinstance(x, list) else x

        args, kwargs = [held(a) for a in call.args], {k: held(v) for k, v in call.kwargs.items()}
        return args, kwargs, all(isinstance(c, Tensor) for c in contents)

    def _rule(self, call: Call, info: OpInfo | None) -> Any:
        name = call.op
        if info is not None:
            overload = call.op.rpartition(".")[2]
            base = info.base.removesuffix("_") if info.writes else info.base
            for name in (f"{base}.{overload}", base):
                if name in RULES:
                    return RULES[name]
        elif name in RULES:
            return RULES[name]
        raise Unsupported(call.op, call.origin, "it has no native form yet")

    def _view(self, call: Call, info: OpInfo) -> None:
        """A result that shares memory with its argument: a cell that hangs on the argument's."""
        base = call.args[0]
        assert isinstance(base, Ref)
        cell = self._cell(base)
        content = self._read(cell)
        if isinstance(content, Unsupported):
            raise content
        refs = _refs(call.outputs)
        shapes = [self.trace.tensors[r.id].shape for r in refs]
        chains = views_of(self.c, info.base, self.c.shape(content), shapes, call.args[1:], call.kwargs)
        for ref, chain in zip(refs, chains, strict=True):
            if not call.grad and Stop() not in chain:
                chain = (*chain, Stop())
            last = cell
            for view in chain:
                last = _Cell(self._through(view, self._read(last)), last, view)
            held = self._read(last)
            if self.c.shape(held) != self.trace.tensors[ref.id].shape:
                raise GraphError(f"{call.op}: rewritten as {self.c.shape(held)}")
            self.cells[ref.id] = last if chain else _Cell(held, cell, _SAME)

    def _in_place(self, call: Call, info: OpInfo) -> None:
        """`f_(x, ...)`: write f(x, ...) to x."""
        targets = _written(call, info)
        if not info.base.endswith("_") and any(r != t for r, t in zip(_refs(call.outputs), targets, strict=False)):
            self._compute(call, info)  # it writes what its results do not show (noise, saved for its backward)
            for ref in targets:
                self._write(self._cell(ref), Unsupported(call.op, call.origin, "it is written by this op"))
            return
        if len(targets) != 1 or call.args[0] != targets[0] or not info.base.endswith("_"):
            raise Unsupported(call.op, call.origin, "this way of writing in place has no native form")
        cell = self._cell(targets[0])
        args, kwargs, static = self._arguments(call)
        if static:
            call.func(*args, **kwargs)  # views of constants are true views: one write is seen by all
            return
        made = self._rule(call, info)(self.c, *args, **kwargs)
        target = self.trace.tensors[targets[0].id]
        made = self._checked(self.c.spread(made, target.shape), targets[0], call)
        if not call.grad and target.requires_grad:
            made = past_autograd(self.c, self.c.real(args[0]), made)
        self._write(cell, made)

    def _compute(self, call: Call, info: OpInfo | None) -> None:
        args, kwargs, static = self._arguments(call)
        refs = _refs(call.outputs)
        if static and call.func is not None:
            made = _flat(call.func(*args, **kwargs))
        else:
            made = _flat(self._rule(call, info)(self.c, *args, **kwargs))
        for i, ref in enumerate(refs):
            if ref.id in self.cells:
                continue
            if i >= len(made) or made[i] is None:
                self.cells[ref.id] = _Cell(Unsupported(call.op, call.origin, f"its result {i} has no native form"))
            else:
                self.cells[ref.id] = _Cell(self._checked(made[i], ref, call))

    def _checked(self, content: Content, ref: Ref, call: Call) -> Content:
        """A result, without gradient where gradients are off, after a check against what the run gave."""
        info = self.trace.tensors[ref.id]
        if self.c.shape(content) != info.shape:
            raise GraphError(f"{call.op}: rewritten as {self.c.shape(content)}, the run gave {info.shape}")
        if isinstance(content, Tensor):
            return content
        if (narrow := self._may_wrap(call, info)) is not None:
            raise Unsupported(call.op, call.origin, f"it computes in {narrow}, which wraps around")
        foreign = info.dtype.is_floating_point and info.dtype != self.trace.dtype
        if info.dtype.is_complex or (foreign and not self._exact(call, info)):
            reason = f"its result is {info.dtype}, the parameters are {self.trace.dtype}"
            raise Unsupported(call.op, call.origin, reason)
        if not call.grad and info.dtype.is_floating_point:
            return Stop().get(self.b, content)
        return content

    def _may_wrap(self, call: Call, info: TensorInfo) -> torch.dtype | None:
        """The integer type narrower than int64 that a call computes in, where it does more than to move or to compare
        numbers that fit: PyTorch takes −1 for 255 next to a uint8."""
        base, dtype = _base(call).removesuffix("_"), info.dtype
        refs = _refs(list(call.args))
        operands = [torch.empty([0] * len(t.shape), dtype=t.dtype) for t in (self.trace.tensors[r.id] for r in refs)]
        numbers = [a for a in call.args if isinstance(a, (int, float))]
        if base in _COMPARES:
            dtype = torch.result_type(*operands, *numbers)
        if dtype not in _NARROW or base in _PICKS:
            return None
        spans = [_span(t.dtype) for t in operands] + [(n, n) for n in numbers if base in _OF_NUMBERS]
        low, high = _span(dtype)
        moves = base in _MOVES | _OF_NUMBERS
        return None if moves and all(low <= a and b <= high for a, b in spans) else dtype

    def _exact(self, call: Call, info: TensorInfo) -> bool:
        """Whether the call only moves elements that its dtype holds as they are: a mask or a choice of constants in
        another precision than the parameters' is the same numbers in theirs."""
        read = [self.trace.tensors[r.id].dtype for r in _refs(list(call.args))]
        numbers = [a for a in call.args if isinstance(a, float)]
        held = all(d in _SMALL or d == info.dtype for d in read)
        return _base(call) in _MOVES and held and all(a == torch.tensor(a, dtype=info.dtype).item() for a in numbers)


_SAME = View()  # a second tensor over the same memory
_MOVES = {"_to_copy", "where", "masked_fill", "clone", "cat", "stack", "repeat", "flip", "roll"}
_COMPARES = {"gt", "ge", "lt", "le", "eq", "ne"}
_OF_NUMBERS = _COMPARES | {"where", "masked_fill", "copy", "fill"}  # numbers among their arguments are no dims
_PICKS = {"index", "index_select", "gather"}  # of the first argument, in its type
_NARROW = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32}
_SMALL = {torch.bool, torch.uint8, torch.int8, torch.int16}  # every floating-point dtype of interest holds them


def _span(dtype: torch.dtype) -> tuple[float, float]:
    """The least and the greatest number that a dtype holds."""
    if dtype == torch.bool:
        return 0, 1
    info = torch.finfo(dtype) if dtype.is_floating_point or dtype.is_complex else torch.iinfo(dtype)
    return info.min, info.max


def _base(call: Call) -> str:
    return op_info(call.func).base if call.func is not None else call.op


def _refs(x: Any) -> list[Ref]:
    if isinstance(x, Ref):
        return [x]
    return [r for e in x for r in _refs(e)] if isinstance(x, (list, tuple)) else []


def _flat(x: Any) -> Sequence[Content]:
    return x if isinstance(x, (list, tuple)) else (x,)


def _written(call: Call, info: OpInfo | None) -> list[Ref]:
    if info is None:
        return []
    return [
        r
        for position, name in info.writes
        for r in _refs(call.args[position] if position < len(call.args) else call.kwargs.get(name))
    ]
