"""What a capture writes down: calls, tensors, where each came from; and what is known of an op."""

from __future__ import annotations

import linecache
import os
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from metafast.errors import MetafastError

_SHOWN = 60  # characters of the user's line in an origin


class Unsupported(MetafastError):
    """Something that cannot go native: which op, where (module path and the user's line), and why."""

    def __init__(self, op: str, origin: object, reason: str) -> None:
        self.op, self.origin, self.reason = op, str(origin), reason
        self.located = isinstance(origin, Origin) and origin.code is not None  # whether it shows a line
        where = f" in {self.origin}" if self.origin else ""
        super().__init__(f"{op}{where}: {reason}")


@dataclass(frozen=True)
class Ref:
    """A tensor of the run: a position in `Trace.tensors`."""

    id: int


@dataclass
class TensorInfo:
    """What is known of a tensor: `key` of a leaf ("param/w"), `literal` its values where the code spelled them out."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    key: str | None = None
    literal: Tensor | None = None
    requires_grad: bool = False


@dataclass(frozen=True)
class Origin:
    """The innermost module of the model that was running, and the user's line; text only when asked for."""

    module: str = ""
    code: CodeType | None = None
    line: int = 0

    def __str__(self) -> str:
        if self.code is None:
            return self.module
        name = self.code.co_filename
        text = linecache.getline(name, self.line).strip()
        text = text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
        place = f"{os.path.basename(name)}:{self.line}" + (f" `{text}`" if text else "")
        return f"{self.module}: {place}" if self.module else place


@dataclass
class Call:
    """`outputs = op(*args, **kwargs)`, tensors replaced by Refs.

    `func` is None for a macro (a function taken as one call), which only has a name. `grad` is whether autograd was on.
    """

    op: str
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Any
    grad: bool
    origin: Origin


@dataclass(frozen=True)
class Stat:
    """A BatchNorm pass in training mode.

    The Graph's outputs `<output>/mean` and `<output>/var` (biased) are its statistics, each over `count` elements a
    channel; they move the running ones of the module at `path` by `momentum`, None for a cumulative average.
    """

    path: str
    output: str
    momentum: float | None
    count: int
    position: int  # in Trace.calls


@dataclass
class Trace:
    """What one run did. `loss` is the eager loss; `gradients` the eager gradient of it, computed when first read."""

    calls: list[Call]
    tensors: list[TensorInfo]
    dtype: torch.dtype
    loss_ref: Ref | None
    outputs: dict[str, Ref]
    output_spec: Any
    externs: list[tuple[str, Tensor]]
    stats: list[Stat]
    reads: Mapping[str, tuple[str, Origin]] = field(default_factory=dict)  # keys of buffers: who first reads them
    updates: Set[str] = frozenset()  # keys of buffers that BatchNorm updates
    loss: Tensor | None = None
    values: Mapping[str, Tensor] = field(default_factory=dict)  # of a function: its leaves by key, and what it returned
    graphs: dict[Any, Any] = field(default_factory=dict)  # what was made of it, kept by who makes it
    _leaves: dict[str, Tensor] = field(default_factory=dict)
    _root: Tensor | None = None
    _gradients: dict[str, Tensor | None] = field(default_factory=dict)

    @property
    def gradients(self) -> dict[str, Tensor | None]:
        """The eager loss's gradient by leaf key, None where nothing depends on the leaf. Frees the run's tensors."""
        if self._root is not None:
            keys = [k for k, t in self._leaves.items() if t.requires_grad]
            grads: Sequence[Tensor | None] = [None] * len(keys)
            if self._root.requires_grad and keys:
                with torch.inference_mode(False):
                    grads = torch.autograd.grad(self._root, [self._leaves[k] for k in keys], allow_unused=True)
            self._gradients = dict(zip(keys, grads, strict=True))
            self._root, self._leaves = None, {}
        return self._gradients

    def written(self) -> Trace:
        """What was written down, without the numbers of the run."""
        return replace(self, loss=None, values={}, _leaves={}, _root=None, _gradients={})

    def with_externs(self, keys: Mapping[int, str]) -> Trace:
        """The same with these keys, by `id`, for the tensors found outside; the others are named by what they are."""
        new = {key: keys.get(id(t), extern_key(t)) for key, t in self.externs}
        if all(key == now for key, now in new.items()):
            return self
        return replace(
            self,
            tensors=[replace(info, key=new[info.key]) if info.key in new else info for info in self.tensors],
            externs=[(new[key], t) for key, t in self.externs],
            graphs={},
            _leaves={new.get(key, key): t for key, t in self._leaves.items()},
        )

    def __str__(self) -> str:
        return show(self)


def extern_key(tensor: Tensor) -> str:
    """The key of a tensor found outside that is no leaf of the call."""
    return f"extern/{id(tensor):x}"


def show(trace: Trace) -> str:
    """The trace as text: one line a leaf and a call; `#` is where the call came from."""

    def text(x: Any) -> str:
        if isinstance(x, Ref):
            return f"%{x.id}"
        return f"[{', '.join(map(text, x))}]" if isinstance(x, (list, tuple)) else str(x)

    def typed(ref: Ref) -> str:
        return f"%{ref.id}:{'×'.join(map(str, trace.tensors[ref.id].shape)) or '()'}"

    lines = [f"  {typed(Ref(i)):<24} = {t.key}" for i, t in enumerate(trace.tensors) if t.key is not None]
    for call in trace.calls:
        made = call.outputs if isinstance(call.outputs, (list, tuple)) else [call.outputs]
        left = ", ".join(typed(r) for r in made if isinstance(r, Ref))
        args = ", ".join([*map(text, call.args), *(f"{k}={text(v)}" for k, v in call.kwargs.items())])
        tail = f"    # {call.origin}" if str(call.origin) else ""
        lines.append(f"  {left:<24} = {call.op}({args}){tail}")
    if trace.loss_ref is not None:
        lines.append(f"  return loss = {text(trace.loss_ref)}")
    return "\n".join([*lines, *(f"  return {name} = {text(ref)}" for name, ref in trace.outputs.items())])


# ---- what is known of an op ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpInfo:
    """An overload, as its schema has it.

    `base` is the name without overload; `writes` the positions and names of arguments that change in place; `view`
    whether results share memory with an argument; `random` whether it may draw; `steers` whether its result is a Python
    value or a shape that depends on the data; `reshapes` whether it changes an argument's own shape (`unsqueeze_`).
    """

    name: str
    base: str
    writes: tuple[tuple[int, str], ...]
    view: bool
    random: bool
    steers: bool
    reshapes: bool


_INFO: dict[Any, OpInfo] = {}


def op_info(func: Any) -> OpInfo:
    """What the schema says of an overload; cached."""
    found = _INFO.get(func)
    if found is None:
        schema, tags = func._schema, func.tags
        written = [a.alias_info is not None and a.alias_info.is_write for a in schema.arguments]
        base = schema.name.split("::")[1] if schema.name.startswith("aten::") else schema.name
        reshapes = torch.Tag.inplace_view in tags
        shares = any(r.alias_info is not None for r in schema.returns)
        found = _INFO[func] = OpInfo(
            name=str(func),
            base=base.removesuffix("_") if reshapes else base,
            writes=tuple((i, a.name) for i, (a, w) in enumerate(zip(schema.arguments, written, strict=True)) if w),
            view=reshapes or (shares and not any(written)),
            random=torch.Tag.nondeterministic_seeded in tags,
            # An index is tagged for its boolean masks, which are looked at one by one.
            steers=base != "index"
            and (torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags),
            reshapes=reshapes,
        )
    return found
