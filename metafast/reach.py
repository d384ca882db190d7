"""What the losses and the update rule can read besides their arguments, and whether it still is what it was.

A plan holds for one state of all that: attributes of modules and objects, closures, defaults, globals that the code
names, class attributes, hooks. A walk over code and objects finds the places; its `key` tells two states apart, and
`same()` looks at the places again, which costs microseconds. Of an object that is no module only the attributes that
some code reached by the walk names are looked at, so that a trainer's step counter makes no new plan.

What cannot be looked at in microseconds (`refused`: very long containers, iterators of Python's own) keeps a loss from
going native. What no walk can see (files, clocks, settings of libraries) must not steer a loss.
"""

from __future__ import annotations

import array
import collections
import contextvars
import enum
import functools
import itertools
import operator
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .generators import Generator, plain
from .names import modules_named, names_of, of_the_user

__all__ = ["CHANGES", "Reach"]

CHANGES = "running the losses or the update rule changes what they read (a counter? a random generator?)"

_DEPTH = 24
_WIDTH = 1 << 16  # longer containers take too long to be looked through at each call
_BYTES = 1 << 22  # so do larger NumPy arrays
_LONG = 1 << 8  # of longer containers (registries, data) the entries are watched, and not what is in them
_UNREAD_BYTES = 1 << 14  # larger arrays, and long containers, are data where they are attributes that no code names
_MISSING = object()
_CONSTANTS = (type(None), bool, int, str, bytes, complex, torch.dtype, torch.device, torch.layout, torch.memory_format)
_CODE = (types.FunctionType, types.MethodType, functools.partial)
_BY_ANY_NAME = frozenset({"getattr", "vars", "__dict__", "__getattribute__", "attrgetter", "eval", "exec"})
_STORES = ("_parameters", "_buffers", "_modules")
_INTERNAL = frozenset(nn.Module().__dict__) - {"training"}
_HOOKS = tuple(name for name in nn.Module().__dict__ if name.endswith("_hooks"))
_GLOBAL_HOOKS = tuple(name for name in vars(torch.nn.modules.module) if name.startswith("_global_") and "hooks" in name)
_RAW = (bytearray, memoryview, array.array)
_OF_A_FUNCTION = ("__code__", "__defaults__", "__kwdefaults__")
_OF_A_RULE = frozenset({"_cache", "_changes"})
_CALLED = frozenset({"init", "update"})  # of an update rule, by us: no code of the user's names them


class Reach:
    """All places that the code under `roots` and the forward of `model` can read, found once.

    `key` is hashable: equal keys mean that a plan made for one state serves the other. It keeps nothing alive but code.
    `code` is the part of it that no state changes: the code of the roots.
    `draws()` is the state of the random generators among them that are no module's own; `generators()` reads and sets
    those that can be set. `refused` says what is among them that cannot be looked at again, or is None.
    """

    def __init__(self, model: nn.Module, *roots: Any) -> None:
        self.code = tuple(map(_code, roots))
        names: frozenset[str] = frozenset()
        while True:  # code that was reached names more attributes, which lead to more code
            walk = _Walk(names)
            key = walk.all(model, roots)
            if walk.names <= names:
                break
            names = names | walk.names
        self.key = _Key(key)
        self._places = _watched(walk)
        self._lists = walk.lists
        self._tensors = [(t, _tensor_facts(t)) for t in walk.tensors]
        self._computed = walk.computed
        self._generators = walk.generators
        self.refused = walk.refused
        self._keep = walk.keep

    def same(self) -> bool:
        """Whether every place holds the very object that it held. False where the compiled module is missing: then
        nobody keeps a plan."""
        return self._places is not None and self._places.hold() and self._others_same()

    def _others_same(self) -> bool:
        return (
            (not self._lists or all([_same_items(items, before) for items, before in self._lists]))
            and (not self._tensors or all([_tensor_facts(tensor) == facts for tensor, facts in self._tensors]))
            and (not self._computed or all([read() == before for read, before in self._computed]))
        )

    def watched(self) -> list[Any]:
        """Compiled `Places` that hold as long as it is the same."""
        if not (self._lists or self._tensors or self._computed):
            return [self._places]
        return [self._places, _compiled([("answer", self._others_same, None, True)])]

    def finds(self, before: Reach) -> bool:
        """Whether it finds what an earlier one found, the same tensors among it."""
        tensors = zip(self._tensors, before._tensors, strict=True)
        return self.key == before.key and all(a is b for (a, _), (b, _) in tensors)

    def versions(self) -> list[int]:
        """How often each tensor that it finds was written to in place; PyTorch does not count for inference tensors."""
        return [0 if tensor.is_inference() else tensor._version for tensor, _ in self._tensors]

    def draws(self) -> list[Any]:
        """The states of generator objects, to see whether a run drew from one."""
        return [plain(read()) for _, read, _ in self._generators]

    def generators(self) -> list[Generator]:
        """Those whose states can be set."""
        return [(name, read, put) for name, read, put in self._generators if put is not None]


class _Key:
    """A value whose hash is computed once."""

    __slots__ = ("_hash", "_value")

    def __init__(self, value: Any) -> None:
        self._value, self._hash = value, hash(value)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._value == other._value


class _Identity:
    """Stands for an object that is known by identity alone; equal only while it lives."""

    __slots__ = ("_hash", "_ref")

    def __init__(self, value: Any) -> None:
        self._hash = id(value)
        try:
            self._ref: Callable[[], Any] = weakref.ref(value)
        except TypeError:
            self._ref = lambda: value

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and (own := self._ref()) is not None and own is other._ref()


class _Walk:
    """One pass over everything, depth first; each method returns the part of the key that stands for its argument."""

    def __init__(self, names: frozenset[str]) -> None:
        self._wanted, self._sorted = names, sorted(names)
        self._any_name = bool(names & _BY_ANY_NAME)
        self.names: set[str] = set()
        self.places: list[tuple[str, Any, Any, Any]] = []
        self.sizes: list[tuple[Any, int]] = []
        self.lists: list[tuple[Any, Any]] = []
        self.tensors: list[Tensor] = []
        self.computed: list[tuple[Callable[[], Any], Any]] = []
        self.generators: list[_State] = []
        self.refused: str | None = None
        self._unread = False  # whether what is visited is an attribute of a module that no code names
        self.keep: list[Any] = []
        self._numbers: dict[int, int] = {}
        self._inside: frozenset[int] = frozenset()

    def all(self, model: nn.Module, roots: Iterable[Any]) -> Any:
        """The model, the roots, and the hooks that torch keeps for all modules."""
        modules = list(model.modules())
        self._inside = frozenset(map(id, modules))
        for module in modules:
            self._number(module)
        inside = [self._module(module, 0) for module in modules]
        hooks = [self.visit(getattr(torch.nn.modules.module, name), 0) for name in _GLOBAL_HOOKS]
        return (tuple(inside), tuple([self.visit(root, 0) for root in roots]), tuple(hooks))

    def visit(self, value: Any, depth: int) -> Any:
        """Any value."""
        constant = _constant(value)
        if constant is not None and not of_the_user(type(value).__module__):
            return constant
        if isinstance(value, type):
            return self._class(value, depth)
        if (number := self._numbers.get(id(value))) is not None:
            return ("again", number)
        self._number(value)
        if depth > _DEPTH:
            return _Identity(value)
        if constant is not None:
            return (constant, self._class_and_attributes(value, depth))
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, nn.Module):
            return self._module(value, depth)
        if isinstance(value, _CODE):
            return self._function(value, depth)
        if isinstance(value, (list, tuple, deque, dict, set, frozenset)):
            key = self._container(value, depth)
            own = of_the_user(type(value).__module__)
            return (key, self._class_and_attributes(value, depth)) if own else key
        if isinstance(value, types.ModuleType):
            names = [*self._sorted, "environ"] if "getenv" in self._wanted else self._sorted
            return (_Identity(value), self._named(value.__dict__, depth, names))
        return self._object(value, depth)

    def _number(self, value: Any) -> None:
        self._numbers[id(value)] = len(self._numbers)
        self.keep.append(value)

    # -- tensors and numbers

    def _tensor(self, tensor: Tensor) -> Any:
        """One that requires grad is a leaf of the call; any other is held, and read at each call, by the plan."""
        self.tensors.append(tensor)
        key = [tensor.requires_grad or _Identity(tensor), _tensor_facts(tensor)]
        if tensor.__dict__:
            key.append(self._named(tensor.__dict__, 0, self._sorted))
        if "grad" in self._wanted and tensor.is_leaf:
            key.append(self._read(functools.partial(getattr, tensor, "grad"), 0))
        return tuple(key)

    def _read(self, read: Callable[[], Any], depth: int) -> Any:
        """What a function without side effects returns, which may be another object next time."""
        value = read()
        self.computed.append((functools.partial(_same_result, read, value), True))
        return self.visit(value, depth + 1)

    # -- places

    def _slot(self, store: Any, name: str, depth: int) -> Any:
        value = store[name]
        self.places.append(("item", store, name, value))
        return (name, self.visit(value, depth + 1))

    def _named(self, store: Any, depth: int, names: Iterable[str]) -> tuple[Any, ...]:
        """The entries of a dict whose names are among `names`."""
        self.sizes.append((store, len(store)))
        return tuple([self._slot(store, name, depth) for name in names if name in store])

    def _container(self, value: Any, depth: int) -> Any:
        self.sizes.append((value, len(value)))
        if self._unread and len(value) > _LONG:
            return self._passed_by(value)
        if len(value) > _WIDTH:
            return self._refuse(value, f"a {type(value).__name__} of {len(value)} entries")
        if isinstance(value, dict):
            items = list(value.items())
            if len(value) > 1:
                self.places.append(("order", value, None, tuple(value)))
            self.places += [("item", value, key, entry) for key, entry in items]
            visit = self._visitor(len(items))
            return (type(value), tuple([(visit(k, depth + 1), visit(v, depth + 1)) for k, v in items]))
        before = value.copy() if isinstance(value, set) else tuple(value)
        if not isinstance(value, (tuple, frozenset)):
            self.lists.append((value, before))
        kind = frozenset if isinstance(value, (set, frozenset)) else tuple
        visit = self._visitor(len(value))
        return (type(value), kind([visit(entry, depth + 1) for entry in value]))

    def _visitor(self, entries: int) -> Callable[[Any, int], Any]:
        return self.visit if entries <= _LONG else self._entry

    def _entry(self, value: Any, depth: int) -> Any:
        """One of a long container's: numbers and words, or known by identity."""
        return self.visit(value, depth) if isinstance(value, (*_CONSTANTS, float)) else _Identity(value)

    def _module(self, module: nn.Module, depth: int) -> Any:
        """Flags, plain attributes, children and hooks; of a module outside the model, parameters and buffers too."""
        own = module.__dict__
        if type(module).__module__.startswith("metafast.") and "_hyper_names" not in own:
            return self._inner_loop(module, depth)
        hyper = own.get("_hyper_names", ())  # of an update rule: leaves of the call, or numbers that become some
        hidden = _INTERNAL.union(_OF_A_RULE, hyper) if hyper else _INTERNAL
        self.places.append(("type", module, None, type(module)))
        self.sizes.append((own, len(own)))
        key = [self._class(type(module), depth)]
        key += [self._attribute_of(own, name, depth) for name in list(own) if name not in hidden]
        for name in ("_modules", *_HOOKS) if id(module) in self._inside else (*_STORES, *_HOOKS):
            if (store := own.get(name)) is not None:
                key.append((name, self._named(store, depth, [entry for entry in store if entry not in hyper])))
        return tuple(key)

    def _attribute_of(self, own: dict[str, Any], name: str, depth: int) -> Any:
        before, self._unread = self._unread, not self._any_name and name not in self._wanted
        key = self._slot(own, name, depth)
        self._unread = before
        return key

    def _inner_loop(self, inner: nn.Module, depth: int) -> Any:
        """A loss that knows the loop it is the loss of: the options that code names. Hyper-parameters are leaves of the
        call to the rule alone."""
        options = [name for name in self._sorted if name in inner.__dict__ and name not in _INTERNAL]
        key = [_Identity(inner), self._named(inner.__dict__, depth, options)]
        rule = inner._modules.get("update")
        if rule is not None and "update" in self._wanted:
            hyper = [name for name in rule.__dict__.get("_hyper_names", ()) if name in self._wanted]
            key.append(self._named(rule.__dict__, depth, hyper))
        return tuple(key)

    def _refuse(self, value: Any, what: str) -> Any:
        if self._unread:
            return self._passed_by(value)
        self.refused = self.refused or what
        return _Identity(value)

    def _passed_by(self, value: Any) -> Any:
        """What no code reads by its name is data. Where code reaches it otherwise, it is looked through there."""
        del self._numbers[id(value)]
        return (_Identity(value), len(value) if hasattr(value, "__len__") else 0)

    def _function(self, f: Any, depth: int) -> Any:
        if isinstance(f, functools.partial):
            return (functools.partial, *[self.visit(part, depth + 1) for part in (f.func, f.args, f.keywords)])
        if isinstance(f, types.MethodType):
            return (types.MethodType, self.visit(f.__func__, depth + 1), self.visit(f.__self__, depth + 1))
        self.places += [("attribute", f, name, getattr(f, name)) for name in _OF_A_FUNCTION]
        key: list[Any] = [f.__code__, self.visit(f.__defaults__, depth + 1), self.visit(f.__kwdefaults__, depth + 1)]
        for cell in f.__closure__ or ():
            content = _content(cell)
            self.places.append(("cell" if content is not _MISSING else "empty cell", cell, None, content))
            key.append(None if content is _MISSING else self.visit(content, depth + 1))
        if of_the_user(f.__globals__.get("__name__")):
            read = names_of(f.__code__)
            self.names.update(read.all)
            key.append(self._named(f.__globals__, depth, read.globals))
            key.append(self._named(f.__dict__, depth, self._sorted))
            key += [self._imported(name, depth) for name in modules_named(read, f.__globals__)]
        return tuple(key)

    def _imported(self, name: str, depth: int) -> Any:
        """A module that code imports when it runs, if that has happened; of an installed one which it is."""
        if (module := sys.modules.get(name)) is not None and _installed(module):
            return _Identity(module)
        if name in sys.modules:
            return self._slot(sys.modules, name, depth)
        self.sizes.append((sys.modules, len(sys.modules)))
        return name

    def _class(self, cls: type, depth: int) -> Any:
        """What a class of the user's defines itself and inherits, as far as code names it; of others, the forward."""
        key: list[Any] = [_Identity(cls)]
        if id(cls) in self._numbers:
            return key[0]
        if of_the_user(type(cls).__module__):
            key.append(self._class(type(cls), depth))
        for base in cls.__mro__:
            own = vars(base)
            if not of_the_user(base.__module__):
                if base is not nn.Module and "forward" in own:
                    self.places.append(("item", own, "forward", own["forward"]))
                    key.append(_Identity(own["forward"]))
            elif id(base) not in self._numbers:
                self._number(base)
                made = base.__name__ in self._wanted  # by code that was reached
                ours = {"forward", *(_CALLED if _is_rule(cls) else ())}
                names = [n for n in own if n in ours or n in self._wanted or _special(n, own[n], made)]
                key.append(self._named(own, depth, names))
        return tuple(key)

    def _object(self, value: Any, depth: int) -> Any:
        """Attributes by name; what has none is known by identity, descriptors by the functions in them."""
        array = sys.modules.get("numpy")
        if array is not None and isinstance(value, (array.ndarray, array.generic)):
            return self._array(value)
        if isinstance(value, (staticmethod, classmethod)):
            return (type(value), self.visit(value.__func__, depth + 1))
        if isinstance(value, property):
            return (property, self.visit(value.fget, depth + 1))
        if (state := _generator_state(value)) is not None:
            self.generators.append(state)
            return _Identity(value)
        if type(value).__module__ in ("builtins", "itertools") and hasattr(type(value), "__next__"):
            return self._refuse(value, f"an iterator ({type(value).__name__})")
        if (inside := self._of_a_library(value, depth)) is not None:
            return (type(value), inside)
        owner = _attribute(value, "__self__")
        if owner is not None and not isinstance(owner, types.ModuleType):  # a method written in C
            return (getattr(value, "__name__", ""), self.visit(owner, depth + 1))
        key = self._class_and_attributes(value, depth)
        return key if len(key) > 1 else _Identity(value)

    def _class_and_attributes(self, value: Any, depth: int) -> tuple[Any, ...]:
        """What an object's class defines, and its attributes, as far as code names them."""
        key: list[Any] = [self.visit(type(value), depth + 1)]
        self.places.append(("type", value, None, type(value)))
        store = _attribute(value, "__dict__")
        slots = [name for base in type(value).__mro__ for name in _slots_of(base)]
        slotted = [name for name in slots if _attribute(value, name, _MISSING) is not _MISSING]
        if isinstance(store, dict) and store is not value:
            every = self._any_name or type(value).__module__.startswith("metafast.")
            key.append(self._named(store, depth, list(store) if every else self._sorted))
        for name in slotted:
            self.computed.append((functools.partial(_same_attribute, value, name, getattr(value, name)), True))
            key.append((name, self.visit(getattr(value, name), depth + 1)))
        return tuple(key)

    def _of_a_library(self, value: Any, depth: int) -> Any:
        """What Python's own containers and callables hold, whose code no walk reads; None for anything else."""
        if isinstance(value, _RAW):
            raw = bytes(value)
            self.computed.append((functools.partial(bytes, value), raw))
            return raw
        if isinstance(value, (operator.attrgetter, operator.methodcaller)):
            named = [part for arg in value.__reduce__()[1] if isinstance(arg, str) for part in arg.split(".")]
            self.names.update(named)
            return tuple(named)
        if isinstance(value, contextvars.ContextVar):
            return self._read(functools.partial(value.get, None), depth)
        if isinstance(value, weakref.ref):
            return self._read(value, depth)
        if isinstance(value, functools._lru_cache_wrapper):
            clears = _clears(value)
            self.computed.append((functools.partial(_clears, value), clears))
            return (clears, self.visit(value.__wrapped__, depth + 1))
        if isinstance(value, functools.partialmethod):
            return tuple([self.visit(part, depth + 1) for part in (value.func, value.args, value.keywords)])
        if type(value) is collections.UserList:
            return self._slot(value.__dict__, "data", depth)
        if not isinstance(value, Mapping) or of_the_user(type(value).__module__):
            return None
        if self._unread and len(value) > _LONG:
            return self._passed_by(value)
        if len(value) > _WIDTH:
            return self._refuse(value, f"a {type(value).__name__} of {len(value)} entries")
        items = list(value.items())
        self.computed.append((functools.partial(_same_entries, value, items), True))
        visit = self._visitor(len(items))
        return tuple([(visit(k, depth + 1), visit(v, depth + 1)) for k, v in items])

    def _array(self, value: Any) -> Any:
        if self._unread and (value.nbytes > _UNREAD_BYTES or value.dtype.hasobject):
            return self._passed_by(value)
        if value.nbytes > _BYTES or value.dtype.hasobject:
            return self._refuse(value, f"a NumPy array of {value.nbytes} bytes, dtype {value.dtype}")
        try:
            raw = value.tobytes()
        except Exception:  # a subclass of the user's, or NumPy's masked constant
            return _Identity(value)
        self.computed.append((value.tobytes, raw))
        return (type(value), str(value.dtype), value.shape, raw)


def _watched(walk: _Walk) -> Any:
    """What looks at the places again; None where the compiled module is missing."""
    try:
        return _compiled(walk.places, walk.sizes)
    except ImportError:
        return None


def _compiled(places: list[tuple[str, Any, Any, Any]], sizes: Iterable[tuple[Any, int]] = ()) -> Any:
    from metafast import _C

    return _C.Places(places, list(sizes))


def _constant(value: Any) -> tuple[Any, ...] | None:
    """The value of a number, a word or their like; None for what is none."""
    if isinstance(value, enum.Enum):
        return (_Identity(value),)
    if isinstance(value, float):
        return (type(value), value.hex())  # tells -0.0 from 0.0
    return (type(value), value) if isinstance(value, _CONSTANTS) else None


def _code(root: Any) -> Any:
    """The code of a callable, without what it closes over."""
    for inside in ("loss", "func", "__func__"):  # a loss as an objective, a partial, a method
        if (part := _attribute(root, inside)) is not None and not isinstance(root, nn.Module):
            return _code(part)
    return getattr(root, "__code__", type(root))


def _special(name: str, value: Any, made: bool) -> bool:
    """Whether Python may call it unnamed: operators, calls, `__init__` where the class is `made` during a run."""
    return name[:2] == "__" and isinstance(value, types.FunctionType) and (made or name not in ("__init__", "__new__"))


def _tensor_facts(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.requires_grad, tensor.shape, tensor.dtype)


def _same_items(items: Any, before: Any) -> bool:
    if isinstance(items, set):
        return bool(items == before)
    return len(items) == len(before) and all(map(operator.is_, items, before))


def _same_attribute(owner: Any, name: str, before: Any) -> bool:
    return _attribute(owner, name, _MISSING) is before


def _same_result(read: Callable[[], Any], before: Any) -> bool:
    return read() is before


def _same_entries(mapping: Mapping[Any, Any], before: list[tuple[Any, Any]]) -> bool:
    """The same keys in order, and the same objects or equal constants: `os.environ` makes its strings anew."""
    now = list(mapping.items())
    return len(now) == len(before) and all(
        _same_constant(a, c) and _same_constant(b, d) for (a, b), (c, d) in zip(now, before, strict=True)
    )


def _same_constant(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, _CONSTANTS) and bool(a == b))


def _attribute(owner: Any, name: str, default: Any = None) -> Any:
    """`getattr`, where a `__getattr__` of the user's may raise whatever it likes."""
    try:
        return getattr(owner, name, default)
    except Exception:
        return default


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return _MISSING


def _installed(module: types.ModuleType) -> bool:
    file = str(_attribute(module, "__file__") or "")
    return "site-packages" in file or "dist-packages" in file


def _is_rule(cls: type) -> bool:
    from .updates import UpdateRule

    return issubclass(cls, UpdateRule)


_ran: weakref.WeakKeyDictionary[Any, tuple[int, int]] = weakref.WeakKeyDictionary()


def _clears(cached: Any) -> int:
    """How often the results of a cached function were seen to be gone: it has run less often than before."""
    clears, before = _ran.get(cached, (0, 0))
    now = cached.cache_info().misses
    clears += now < before
    if now != before:
        _ran[cached] = clears, now
    return clears


def _slots_of(cls: type) -> Iterator[str]:
    slots = cls.__dict__.get("__slots__", ()) if of_the_user(cls.__module__) else ()
    for name in (slots,) if isinstance(slots, str) else slots:
        if name not in ("__dict__", "__weakref__"):
            yield name


_State = tuple[str, Callable[[], Any], "Callable[[Any], Any] | None"]


def _generator_state(value: Any) -> _State | None:
    """How to read what a generator has come to, and how to set it: one of random numbers that is no module's own, a
    counter, a generator function's."""
    kind = f"{type(value).__module__}.{type(value).__name__}"
    if isinstance(value, itertools.count):
        return kind, lambda: repr(value), None
    if isinstance(value, types.GeneratorType):
        return (
            kind,
            lambda: value.gi_frame and (value.gi_frame.f_lasti, *map(id, value.gi_frame.f_locals.values())),
            None,
        )
    if isinstance(value, torch.Generator):
        return "torch.Generator", value.get_state, value.set_state
    if kind == "random.Random":
        return kind, value.getstate, value.setstate
    if kind == "numpy.random._generator.Generator":
        bits = value.bit_generator
        return "numpy.random.Generator", lambda: bits.state, functools.partial(setattr, bits, "state")
    if kind == "numpy.random.mtrand.RandomState":
        return "numpy.random.RandomState", value.get_state, value.set_state
    return None
