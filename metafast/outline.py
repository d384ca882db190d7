"""What holds of an `InnerLoop` from call to call, and the problem that a call poses.

Traversing a model, matching patterns and looking for tensors in closures happens once; a call reads the tensors from
where they are known to lie, and checks that nothing was added, removed or replaced since.
"""

from __future__ import annotations

import fnmatch
import functools
import operator
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.parameter import is_lazy

from . import tasks
from .errors import InputError, InputTypeError, LabelError, message
from .externs import find_externs
from .problem import Loss, Objective, Problem
from .reach import Reach
from .reference import swapping
from .structure import Structure
from .transforms import tracing, transformed

if TYPE_CHECKING:
    from .inner_loop import InnerLoop
    from .updates import UpdateRule

__all__ = ["LossObjective", "Outline", "require_labels"]

NO_QUERY = object()  # in place of a query batch: adapt alone
MOST_LASTS = 4  # calls of other shapes, or for something else, that take turns

_SHORT = (torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64)


class LossObjective:
    """A loss of (output, target) as an objective on batches (x, y)."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss

    def __call__(self, model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
        x, y = batch
        output = model(x)
        if isinstance(y, Tensor) and y.is_cuda:
            require_labels(self.loss, output, y)
        try:
            return self.loss(output, y), output
        except RuntimeError:
            if not isinstance(y, Tensor) or y.dtype != torch.uint8:
                raise
        # As a leaf uint8 is not widened: it may be an image, or a mask. Some ops of PyTorch take no such labels.
        return self.loss(output, y.long()), output


def require_labels(loss: Loss, output: Any, target: Tensor) -> None:
    """Labels must name a class of the output. On the CPU the loss says so itself; a GPU would abort the process.

    **Raises** `LabelError` for cross_entropy and nll_loss, as functions or modules; other losses are not looked into.
    """
    known = loss in (F.cross_entropy, F.nll_loss) or isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss))
    if not known or target.is_floating_point() or not isinstance(output, Tensor) or not target.numel():
        return
    classes = output.shape[1] if output.dim() > 1 else output.shape[0]
    ignored = getattr(loss, "ignore_index", -100)
    wrong = ((target < 0) | (target >= classes)) & (target != ignored)
    if wrong.any():
        got, expected = f"label {int(target[wrong][0])}", f"0 .. {classes - 1}"
        way_out = "number the classes of each task from 0, or widen the model's output"
        raise LabelError(message("label out of range", got, expected, way_out))


class Outline:
    """Names, what adapts, objectives, and which tensors the losses read from outside."""

    def __init__(self, inner: InnerLoop) -> None:
        _require_python(inner.model)
        self.structure = structure = Structure(inner.model)
        self.update = inner.update
        names, tensors = structure.parameter_names, structure.parameters()
        if not names:
            way_out = "there is nothing to adapt; give it parameters"
            raise InputError(message("InnerLoop(model)", "a model without parameters", "at least one", way_out))
        for name, tensor in zip(names, tensors, strict=True):
            if is_lazy(tensor):
                way_out = "run the model on one batch first, or write its widths out"
                raise InputError(message(f"parameter {name}", "a lazy one without a shape", "a shape", way_out))
        self.adapted = _select(inner.model, inner._params[0], names, tensors, structure.aliases)
        by_name = dict(zip(names, tensors, strict=True))
        for name in self.adapted:
            _require_dtype(name, by_name[name])
        self.update.check({name: by_name[name].shape for name in self.adapted}, structure.aliases)
        self.objectives, self._pairs = _objectives(inner)
        self._changes = self.update.changes
        self._first = names.index(self.adapted[0])
        self._keys = ["param/" + name for name in names]
        self._names = dict(zip(self._keys, names, strict=True))
        self._inner = weakref.ref(inner)
        self._reach: Reach | None = None
        self._externs: dict[Any, list[weakref.ref[Tensor]]] = {}
        self._weights: dict[Any, Tensor] = {}
        self._lasts: tuple[_Last, ...] = ()  # the latest first, none of an earlier reach

    def current(self) -> bool:
        """Whether it still describes the model and the update rule."""
        return self._changes == self.update.changes and self.structure.current()

    def again(self, inner: InnerLoop, support: Any, query: Any, *, gradient: bool) -> Problem | None:
        """The problem that a call poses, where it is like one of the last: what was looked into then is not looked into
        again. This is on every call's way, a tenth of a small net's.
        """
        for last in self._lasts:
            if (tensors := last.read(inner, support, query, gradient)) is not None:
                return last.over(tensors)
        return None

    def gradient_again(self, inner: InnerLoop, support: Any, query: Any) -> tuple[Tensor, dict[str, Tensor]] | None:
        """What `meta_gradient` returns, where the call is like one of the last and that one was made ready: a problem
        would be made of it for nothing."""
        for last in self._lasts:
            if (ready := last.settled.get("ready")) is None:
                continue
            with swapping:  # another thread may have other tensors on the model just now
                tensors = last.read(inner, support, query, True)
            if tensors is None:
                continue
            if (made := ready.run(tensors)) is None:
                return None
            loss, gradients = made
            if (names := last.settled.get("names")) is None:
                return loss, self.named(last.over(tensors), gradients)
            return loss, dict(zip(names, gradients, strict=True))
        return None

    def problem(self, inner: InnerLoop, support: Any, query: Any, *, gradient: bool) -> Problem | None:
        """The problem that a call poses, validated; None where the outline no longer describes the model."""
        found = self.structure.read()
        if found is None:
            return None
        given = Given(self, *found, support, query)
        problem = self._validated(inner, given, gradient)
        if (made := _Last.of(self, inner, problem, given, gradient)) is not None:
            self._lasts = (made, *self._lasts[: MOST_LASTS - 1])
        return problem

    def _validated(self, inner: InnerLoop, given: Given, gradient: bool) -> Problem:
        structure = self.structure
        first = given.parameters[self._first]
        _require_dtype(self.adapted[0], first)
        if first.is_meta:
            got, way_out = "a tensor on the meta device, without values", "use model.to_empty(device=...) and fill it"
            raise InputTypeError(message(f"parameter {self.adapted[0]}", got, "values", way_out))
        count = self._check_batches(given, first.device)
        leaves = given.leaves()
        problem = Problem(
            model=structure.module,
            inner_objective=self.objectives[0],
            query_objective=self.objectives[1],
            update=self.update,
            steps=inner.steps,
            order=inner.order,
            leaves=leaves,
            adapted=self.adapted,
            support_spec=given.specs[0],
            query_spec=given.specs[1],
            tasks=count,
            wrt=(),
            return_outputs=inner.return_outputs and given.specs[1] is not None,
            reduction=inner.reduction,
            memory_budget=inner.memory_budget,
            buffers=dict(zip(structure.buffer_names, given.buffers, strict=True)),
            places=structure.places,
            reach=self.reach(),
        )
        if gradient or tracing():
            self._want(problem, leaves)
        return problem

    def _check_batches(self, given: Given, device: torch.device) -> int:
        """Validate the batches; returns the number of tasks."""
        for (place, _, tensors), spec, pair in zip(given.batches, given.specs, self._pairs, strict=False):
            if pair:
                tasks.require_pair(place, spec, tensors)
        return tasks.count_tasks(given.batches, device)

    def _want(self, problem: Problem, leaves: dict[str, Tensor]) -> None:
        """Add tensors found in closures and attributes, and say which leaves want a gradient."""
        if not transformed():  # there they are looked for once the wrappers are off
            for index, tensor in enumerate(self._found(problem)):
                leaves[f"extern/{index}"] = tensor
        if tracing():  # what requires grad does not show through all transforms: take every leaf that could
            wrt = [key for key, leaf in leaves.items() if leaf.is_floating_point()]
        else:
            wrt = [key for key, leaf in leaves.items() if leaf.requires_grad]
        object.__setattr__(problem, "wrt", tuple(wrt))

    def reach(self) -> Reach:
        """What the losses and the rule can read besides their arguments, looked for again when some of it changed."""
        if self._reach is None or not self._reach.same():
            before, self._lasts = self._reach, ()
            self._reach = Reach(self.structure.module, *self.objectives, self.update)
            if before is not None and not self._reach.finds(before):
                self._externs.clear()
        return self._reach

    def _found(self, problem: Problem) -> list[Tensor]:
        """Tensors that the losses read from outside; looked for again when the reach changed."""
        shapes = tuple([(leaf.shape[1:], leaf.dtype) for key, leaf in problem.leaves.items() if key[0] in "sq"])
        key = (self.structure.training(), problem.steps > 0, problem.query_spec is None, shapes)
        refs = self._externs.get(key)
        if refs is not None:
            found = [tensor for tensor in (ref() for ref in refs) if tensor is not None]
            if len(found) == len(refs):
                return found
        fresh = find_externs(problem)
        self._externs[key] = [weakref.ref(tensor) for tensor in fresh]
        return fresh

    def weights(self, problem: Problem) -> Tensor:
        """`(T,)`, the weights of the losses: 1/T for "mean", else 1."""
        found: Tensor | None = problem.settled.get("weights")
        if found is None:
            like = problem.parameter
            key = (problem.tasks, problem.reduction, like.dtype, like.device)
            if key not in self._weights:
                value = 1.0 / problem.tasks if problem.reduction == "mean" else 1.0
                self._weights[key] = torch.full((problem.tasks,), value, dtype=like.dtype, device=like.device)
            found = problem.settled["weights"] = self._weights[key]
        return found

    def named(self, problem: Problem, gradients: Sequence[Tensor]) -> dict[str, Tensor]:
        """Gradients by the names that `meta_gradient` promises; a tensor that is several leaves appears once."""
        leaves, names = problem.leaves, problem.settled.get("names")
        if names is None and all(key in self._names for key in problem.wrt):
            names = problem.settled["names"] = [self._names[key] for key in problem.wrt]
        if names is not None:
            return dict(zip(names, gradients, strict=True))
        named: dict[str, Tensor] = {}  # a hyper-parameter or found tensor may be one of the others as well
        known = {id(leaves[key]): name for key, name in self._names.items()}
        for key, grad in zip(problem.wrt, gradients, strict=True):
            name = self._names.get(key) or known.setdefault(id(leaves[key]), self._name(key, leaves[key]))
            named[name] = named[name] + grad if name in named else grad
        return named

    def _name(self, key: str, leaf: Tensor) -> str:
        kind, _, name = key.partition("/")
        if kind == "hyper":
            return "update." + name
        inner = self._inner()
        if kind == "extern" and inner is not None:
            return next((n for n, p in inner.named_parameters() if p is leaf), key)
        return key


class Given:
    """The tensors of a call: parameters, hyper-parameters, batches, buffers, read from where they are now."""

    __slots__ = ("_keys", "batches", "buffers", "hyper", "parameters", "specs", "tensors")

    def __init__(
        self, outline: Outline, parameters: list[Tensor], buffers: list[Tensor], support: Any, query: Any
    ) -> None:
        self._keys = outline._keys
        self.parameters, self.buffers = parameters, buffers
        self.hyper = outline.update.hyper(parameters[outline._first])
        self.batches: list[tuple[str, Any, list[Tensor]]] = []
        self.specs: list[Any] = []
        self.tensors = [*self.parameters, *self.hyper.values()]
        for place, batch in (("support", support), ("query", query)):
            if batch is NO_QUERY:
                self.specs.append(None)
                continue
            flat, spec = tasks.flatten(batch, place)
            self.batches.append((place, batch, flat))
            self.specs.append(spec)
            self.tensors += flat

    def leaves(self) -> dict[str, Tensor]:
        """All but the buffers by key, as autograd and the losses take them."""
        leaves: dict[str, Tensor] = dict(zip(self._keys, self.parameters, strict=True))
        for name, value in self.hyper.items():
            leaves["hyper/" + name] = value
        for place, _, flat in self.batches:
            for index, tensor in enumerate(flat):
                leaves[f"{place}/{index}"] = _taken(tensor)
        return leaves


_OPTIONS = ("steps", "order", "return_outputs", "reduction", "memory_budget", "backend")


class _Last:
    """The problem of one of the last calls without its tensors, and what must hold for the next to be like it."""

    def __init__(
        self, outline: Outline, inner: InnerLoop, problem: Problem, given: Given, gradient: bool, externs: list[Tensor]
    ) -> None:
        from . import _C

        assert problem.reach is not None
        structure, rule = outline.structure, outline.update
        self._problem = problem.over({}, {}, [])
        self._keys, self._buffers = tuple(problem.leaves), tuple(problem.buffers)
        self._gradient, self._specs = gradient, given.specs
        self._pairs = all(spec is tasks.PAIR for spec in given.specs)
        counts = [len(flat) for _, _, flat in given.batches]
        numbers = rule.numbers()
        self._repeat = _C.Repeat(
            [structure.fixed, *problem.reach.watched(), _C.Places(_untouched(rule), [])],
            [(name, inner.__dict__[name]) for name in _OPTIONS],
            *structure.slots,
            None if numbers is None else _C.Places([("attribute", rule, n, v) for n, v in numbers.items()], []),
            tuple(given.hyper.values()),
            functools.partial(_hyper, rule),
            outline._first,
            [weakref.ref(tensor) for tensor in externs],
            _C.Facts([*given.tensors, *externs]),
            _C.Facts(given.buffers),
            (counts[0], sum(counts[1:])),
        )

    @classmethod
    def of(cls, outline: Outline, inner: InnerLoop, problem: Problem, given: Given, gradient: bool) -> _Last | None:
        """None where the call is to be looked into each time: under a transform, or where a leaf is a copy."""
        leaves = list(problem.leaves.values())
        if tracing() or not all(map(operator.is_, leaves, given.tensors)):
            return None
        try:
            return cls(outline, inner, problem, given, gradient, leaves[len(given.tensors) :])
        except (ImportError, RuntimeError):  # no compiled module; a nested tensor has no shape
            return None

    @property
    def settled(self) -> dict[Any, Any]:
        """That of all problems of this form."""
        return self._problem.settled

    def over(self, tensors: list[Tensor]) -> Problem:
        """The problem over the tensors of a call like the last."""
        buffers = dict(zip(self._buffers, tensors[len(self._keys) :], strict=True)) if self._buffers else {}
        return self._problem.over(dict(zip(self._keys, tensors, strict=False)), buffers, tensors)

    def read(self, inner: InnerLoop, support: Any, query: Any, gradient: bool) -> list[Tensor] | None:
        """The tensors of this call, if it is like the last."""
        if gradient is not self._gradient:
            return None
        if not self._pairs:
            if (apart := self._apart(support, query)) is None:
                return None
            support, query = apart
        found: list[Tensor] | None = self._repeat.read(inner.__dict__, support, query)
        return found

    def _apart(self, *batches: Any) -> list[tuple[Any, ...]] | None:
        """The tensors of batches that are no pairs, where they are nested as the last ones."""
        made: list[tuple[Any, ...]] = []
        for place, batch, spec in zip(("support", "query"), batches, self._specs, strict=True):
            flat, nest = ([], None) if batch is NO_QUERY else tasks.flatten(batch, place)
            if nest != spec:
                return None
            made.append(tuple(flat))
        return made


def _hyper(rule: UpdateRule, like: Tensor) -> tuple[Tensor, ...]:
    """The hyper-parameters of a rule whose numbers are others, or that has others than numbers."""
    return tuple(rule.hyper(like).values())


def _untouched(rule: UpdateRule) -> list[tuple[str, Any, Any, Any]]:
    """Places that hold as long as the rule has the hyper-parameters it had, and no transform or trace is under way."""
    return [
        ("item", rule.__dict__, "_changes", rule.changes),
        ("answer", torch._C._is_tracing, None, False),
        ("answer", torch._C._len_torch_dispatch_stack, None, 0),
        ("answer", transformed, None, False),
        ("item", forward_ad.__dict__, "_current_level", -1),
    ]


def _objectives(inner: InnerLoop) -> tuple[tuple[Objective, Objective], tuple[bool, bool]]:
    """The objectives of support and query, and whether each reads a pair (x, y)."""
    own, query = inner.objective, inner.query_objective
    if own is None:
        own = LossObjective(cast(Loss, inner.loss))
    if query is None:
        query = own if inner.query_loss is None else LossObjective(inner.query_loss)
    return (own, query), (isinstance(own, LossObjective), isinstance(query, LossObjective))


def _taken(tensor: Tensor) -> Tensor:
    """A tensor of a batch as a leaf."""
    if tensor.dtype in _SHORT:  # PyTorch's losses take no other labels
        tensor = tensor.long()
    if tensor.is_inference():  # cannot take part in autograd; a copy made outside of that mode can
        with torch.inference_mode(False):
            return tensor.clone()
    return tensor


def _require_python(model: nn.Module) -> None:
    """A scripted module keeps its parameters where no others can be put in their place."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            place, way_out = f"InnerLoop(model), {name or 'the model'}", "pass the module that it was scripted from"
            raise InputTypeError(message(place, f"a {type(module).__name__}", "modules of Python", way_out))


def _require_dtype(name: str, parameter: Tensor) -> None:
    if parameter.dtype is not torch.float32 and parameter.dtype is not torch.float64:
        way_out = "use model.float(), or leave it out of params="
        raise InputTypeError(message(f"parameter {name}", parameter.dtype, "float32 or float64", way_out))


def _select(
    model: nn.Module, params: Any, names: tuple[str, ...], tensors: list[Tensor], aliases: Mapping[str, tuple[str, ...]]
) -> tuple[str, ...]:
    """The names of the parameters that `params` selects, in the model's order."""
    if params is None:
        return names
    chosen: set[str] = set()
    for item in params if isinstance(params, (list, tuple, set, frozenset)) else (params,):
        chosen |= _matches(model, item, names, tensors, aliases)
    if not chosen:
        way_out = "pass names, glob patterns, a submodule or a predicate"
        raise InputError(message("InnerLoop(params=...)", repr(params), "at least one parameter that adapts", way_out))
    return tuple(name for name in names if name in chosen)


def _matches(
    model: nn.Module, item: Any, names: tuple[str, ...], tensors: list[Tensor], aliases: Mapping[str, tuple[str, ...]]
) -> set[str]:
    """What one entry of `params` selects; never nothing, unless it is a predicate."""
    place = "InnerLoop(params=...)"
    if isinstance(item, str):
        found = {name for name in names if any(fnmatch.fnmatchcase(alias, item) for alias in aliases[name])}
        if not found:
            known = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            way_out = f"the model has {known}; a module's parameters are matched by 'name.*'"
            raise InputError(message(place, f"{item!r}", "a name or pattern that matches something", way_out))
        return found
    if isinstance(item, nn.Module):
        own = {id(p) for p in item.parameters()}
        found = {name for name, tensor in zip(names, tensors, strict=True) if id(tensor) in own}
        if not found:
            got = f"a {type(item).__name__} that shares no parameter with the model"
            raise InputError(message(place, got, "a submodule with parameters", "pass a part of this model"))
        return found
    if callable(item):
        pairs = zip(names, tensors, strict=True)
        return {name for name, tensor in pairs if any(item(alias, tensor) for alias in aliases[name])}
    expected = "names, glob patterns, a submodule, or a predicate (name, parameter) -> bool"
    raise InputTypeError(message(place, type(item).__name__, expected, 'pass e.g. "head.*"'))
