"""Update rules of the inner loop: an (init, update) pair in plain torch over the whole parameter tree."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError, InputTypeError, message

__all__ = ["SGD", "UpdateRule", "per_parameter"]

Params = dict[str, Tensor]
State = dict[str, Any]
Hyper = Mapping[str, Any]


def per_parameter(value: Any, name: str) -> Tensor:
    """A hyper-parameter's value for one parameter, whether it is one for all or a mapping.

    **Arguments**: `value`, a tensor or a mapping from parameter name to one, as an update rule finds it in `hyper`;
    `name`, the parameter's. **Returns** the tensor.
    """
    tensor: Tensor = value[name] if isinstance(value, Mapping) else value
    return tensor


class UpdateRule(nn.Module):
    r"""One inner update, \((\phi_{k+1}, s_{k+1}) = U(\phi_k, g_k, s_k; \eta, k, \phi_0)\).

    The state begins as \(s_0 = \mathrm{init}(\phi_0; \eta)\).

    Write one as a subclass with `init` and `update`, or hand the two functions over:

    >>> def decay(params, grads, state, hyper, k, params0):
    ...     return {n: p - hyper["lr"] / (k + 1) * grads[n] for n, p in params.items()}, state
    >>> rule = UpdateRule(update=decay, lr=0.1)

    Both are traced and differentiated like the loss: plain torch, no in-place writes, no branches on values. A rate
    learned for each step is picked by a sum, `(hyper["rates"] * (torch.arange(5) == k)).sum()`: an index made of `k` is
    a Python number, and falls back.

    **Arguments**: `init(params, hyper) -> state`, a dict of any nesting of tensors, by default empty; `update(params,
    grads, state, hyper, k, params0) -> (params, state)`: `params`, `grads`, `params0` map each adapted parameter's
    name to a tensor of its shape, `k` is the step as a 0-dim tensor of their dtype, and `hyper` maps names to
    tensors. `**hyper`, each a number, a tensor, an `nn.Parameter` (learned: it is among `parameters()` and receives
    its meta-gradient), or a mapping from parameter name to one of these. Numbers reach the rule as 0-dim tensors of
    the parameters' dtype and can be set between calls (`rule.lr = 0.1`).

    **Raises** `InputTypeError` for a hyper-parameter of another type. Where an `InnerLoop` is made with the rule,
    `InputError` if it has no update, or for a tensor or mapping that does not fit the parameters that adapt.

    **Cost**: what the two functions compute, once a task and once a step; their state is kept for all K + 1 steps of a
    task. Going back costs one VJP of `update` a step and one of `init` a task.
    """

    def __init__(
        self,
        init: Callable[[Params, Hyper], State] | None = None,
        update: Callable[..., tuple[Params, State]] | None = None,
        **hyper: Any,
    ) -> None:
        super().__init__()
        self._init = init
        self._update = update
        self._hyper_names = tuple(hyper)
        self._changes = 0  # how often a hyper-parameter was set: layouts cached elsewhere look at it
        self._cache: dict[Any, Tensor] = {}
        for name, value in hyper.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        """Register a hyper-parameter so that `parameters()`, `.to()` and `state_dict()` see it."""
        if name not in self.__dict__.get("_hyper_names", ()):
            super().__setattr__(name, value)
            return
        if not isinstance(value, (Mapping, _PerParameter)):
            _require_value(f"{type(self).__name__}({name}=...)", value)
        self._changes += not isinstance(value, float)
        if isinstance(value, Mapping):
            value = _PerParameter(name, value)
        for store in (self.__dict__, self._parameters, self._buffers, self._modules):
            store.pop(name, None)
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            self.register_buffer(name, value)
        else:
            super().__setattr__(name, value)

    def init(self, params: Params, hyper: Hyper) -> State:
        """The state before the first step.

        **Arguments**: `params`, the initial parameters by name; `hyper`, by name. **Returns** a dict of any nesting of
        tensors, in the dtype and on the device of the parameters.
        """
        return self._init(params, hyper) if self._init is not None else {}

    def update(
        self, params: Params, grads: Params, state: State, hyper: Hyper, k: Tensor, params0: Params
    ) -> tuple[Params, State]:
        """Parameters and state after step `k`.

        **Arguments**: as the class says. **Returns** `(params, state)`, of the same names, nesting, shapes and dtypes
        as given. **Raises** `InputError` where the rule has none.
        """
        if self._update is None:
            got = f"a {type(self).__name__} without an update"
            raise InputError(message("update rule", got, "one", "override update, or pass update= a function"))
        return self._update(params, grads, state, hyper, k, params0)

    def hyper(self, like: Tensor) -> dict[str, Tensor]:
        """The hyper-parameters by name, `name.parameter` where there is one per parameter.

        **Arguments**: `like`, whose dtype and device numbers take. **Returns** tensors; learned ones are the parameters
        themselves.
        """
        values: dict[str, Tensor] = {}
        for name in self._hyper_names:
            value = getattr(self, name)
            if isinstance(value, _PerParameter):
                for parameter, entry in value.items():
                    values[f"{name}.{parameter}"] = self._tensor(name, entry, like)
            else:
                values[name] = self._tensor(name, value, like)
        return values

    def numbers(self) -> dict[str, Any] | None:
        """The hyper-parameters by name, where all are numbers: as long as these are the same, so are the tensors of
        `hyper`."""
        if type(self).hyper is not UpdateRule.hyper:
            return None
        values = {name: getattr(self, name) for name in self._hyper_names}
        return values if all(type(value) in (float, int) for value in values.values()) else None

    def _tensor(self, name: str, value: Any, like: Tensor) -> Tensor:
        if isinstance(value, Tensor):
            return value
        key = (value, like.dtype, like.device)
        if key not in self._cache:
            _require_value(f"{type(self).__name__}.{name}", value)
            made = torch.tensor(float(value), dtype=like.dtype, device=like.device)
            if torch._C._functorch.is_functorch_wrapped_tensor(made):  # belongs to a transform that will end
                return made
            if len(self._cache) > 64:  # a schedule sets a new number at every call
                self._cache.clear()
            self._cache[key] = made
        return self._cache[key]

    @contextlib.contextmanager
    def reading(self, hyper: Hyper) -> Iterator[None]:
        """Let a rule that reads `self.lr`, not `hyper["lr"]`, find the same tensor there."""
        stores: tuple[dict[str, Any], ...] = (self.__dict__, self._parameters, self._buffers)
        own = [(store, name, store[name]) for store in stores for name in self._hyper_names if name in store]
        for store, name, _ in own:
            store[name] = hyper[name]
        try:
            yield
        finally:
            for store, name, value in own:
                if store.get(name) is hyper[name]:  # else the rule has set another
                    store[name] = value

    @property
    def changes(self) -> int:
        """A number that differs once a hyper-parameter was replaced by anything but a number."""
        return self._changes

    def check(self, shapes: Mapping[str, torch.Size], aliases: Mapping[str, tuple[str, ...]]) -> None:
        """Validate the hyper-parameters against the parameters that adapt, and bring tied names to the first one.

        **Raises** `InputError` for a mapping that lacks an adapted parameter or names an unknown one.
        """
        if self._update is None and type(self).update is UpdateRule.update:
            self.update({}, {}, {}, {}, torch.zeros(()), {})  # raises, and says so early
        first = {alias: name for name, names in aliases.items() for alias in names}
        for name in self._hyper_names:
            value = getattr(self, name)
            if isinstance(value, _PerParameter):
                value.bind(f"{type(self).__name__}({name}=...)", first, shapes)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}}


class _PerParameter(nn.Module):
    """One hyper-parameter for each of several parameters, registered under the parameters' own dotted names."""

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        super().__init__()
        self._names = list(values)
        self._numbers: dict[str, float] = {}
        for parameter, value in values.items():
            place = f"{name}[{parameter!r}]"
            if not isinstance(parameter, str):
                raise InputTypeError(message(name, f"key {parameter!r}", "parameter names", "use named_parameters()"))
            _require_value(place, value)
            if isinstance(value, Tensor):
                self._register(parameter, value)
            else:
                self._numbers[parameter] = float(value)

    def _register(self, parameter: str, value: Tensor) -> None:
        """Into the stores themselves: `add_module` and its like refuse names of attributes (items, type, half), which
        modules of a model may have and which nothing here looks up as attributes."""
        *path, last = parameter.split(".")
        owner: nn.Module = self
        for part in path:
            owner = owner._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
        if isinstance(value, nn.Parameter):
            owner._parameters[last] = value
        else:
            owner._buffers[last] = value

    def _get(self, parameter: str) -> Any:
        if parameter in self._numbers:
            return self._numbers[parameter]
        *path, last = parameter.split(".")
        owner: nn.Module = self
        for part in path:
            owner = owner._modules[part]  # type: ignore[assignment]
        return owner._parameters[last] if last in owner._parameters else owner._buffers[last]

    def items(self) -> Iterator[tuple[str, Any]]:
        first: dict[str, str] = self.__dict__.get("_first", {})
        return ((first.get(name, name), self._get(name)) for name in self._names)

    def bind(self, place: str, first: Mapping[str, str], shapes: Mapping[str, torch.Size]) -> None:
        unknown = [name for name in self._names if name not in first]
        missing = [name for name in shapes if name not in {first.get(n) for n in self._names}]
        way_out = "give one entry for every parameter that adapts"
        if unknown:
            raise InputError(message(place, f"entries for {unknown}", "names of parameters of the model", way_out))
        if missing:
            raise InputError(message(place, f"no entry for {missing}", "all adapted parameters", way_out))
        self._require_agreement(place, first)
        self.__dict__["_first"] = {name: first[name] for name in self._names}  # a module may be called so as well

    def _require_agreement(self, place: str, first: Mapping[str, str]) -> None:
        """Two names of one tied parameter must not ask for different values: one of them would be taken in silence."""
        given: dict[str, str] = {}
        for name in self._names:
            other = given.setdefault(first[name], name)
            if not _same(self._get(other), self._get(name)):
                got, way_out = f"different entries for {other!r} and {name!r}", "keep one of the two"
                raise InputError(message(place, got, "one for these two names of a tied parameter", way_out))


def _same(one: Any, other: Any) -> bool:
    """Whether two entries are one: the same tensor, or the same number, or plain tensors that were moved apart."""
    if one is other or not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return one is other or (isinstance(one, float) and isinstance(other, float) and one == other)
    learned = one.requires_grad or other.requires_grad
    return not learned and one.device == other.device and torch.equal(one, other)


def _require_value(place: str, value: Any) -> None:
    if isinstance(value, Tensor):
        if not value.is_floating_point():
            raise InputTypeError(message(place, value.dtype, "a floating-point tensor", "use .float()"))
    elif isinstance(value, bool) or not isinstance(value, Real):
        expected = "a number, a tensor, an nn.Parameter, or a mapping from parameter name to one"
        raise InputTypeError(message(place, type(value).__name__, expected, "pass e.g. 0.1"))


def _require_width(place: str, value: Tensor, parameter: str, shape: torch.Size) -> None:
    sizes = zip(reversed(value.shape), reversed(shape), strict=False)
    if value.dim() > len(shape) or any(own not in (1, size) for own, size in sizes):
        got = f"shape {tuple(value.shape)} for {parameter}"
        way_out = "use a 0-dim tensor, or a mapping with one tensor per parameter"
        raise InputError(message(place, got, f"() or the parameter's {tuple(shape)}", way_out))


class SGD(UpdateRule):
    r"""Gradient descent, \(\phi_{k+1} = \phi_k - \eta\, g_k\).

    **Arguments**: `lr`, the inner learning rate: a number, a tensor, an `nn.Parameter` (learned), or a mapping from
    parameter name to one; a tensor as wide as its parameter gives every weight a rate of its own (Meta-SGD, Li et al.,
    arXiv:1707.09835, algorithm 1). It is the inner update of MAML (Finn et al., arXiv:1703.03400, section 2.2).

    **Raises** `InputTypeError` for another type.

    **Cost**: one multiplication and one subtraction a weight and step; no state.
    """

    def __init__(self, lr: Any) -> None:
        super().__init__(lr=lr)

    def check(self, shapes: Mapping[str, torch.Size], aliases: Mapping[str, tuple[str, ...]]) -> None:
        """As any rule's; and a rate must broadcast to its parameter. **Raises** `InputError`."""
        super().check(shapes, aliases)
        rates = dict(self.lr.items()) if isinstance(self.lr, _PerParameter) else dict.fromkeys(shapes, self.lr)
        for parameter, rate in rates.items():
            if isinstance(rate, Tensor) and parameter in shapes:
                _require_width("SGD(lr=...)", rate, parameter, shapes[parameter])

    def update(
        self, params: Params, grads: Params, state: State, hyper: Hyper, k: Tensor, params0: Params
    ) -> tuple[Params, State]:
        """One step down the gradient."""
        return {name: p - per_parameter(hyper["lr"], name) * grads[name] for name, p in params.items()}, state
