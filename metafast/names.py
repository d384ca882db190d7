"""Which names code reads: what a walk over all that losses can read goes by."""

from __future__ import annotations

import dis
import sys
import types
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["Names", "modules_named", "names_of", "of_the_user"]

_READS_GLOBALS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
_IMPORTS = frozenset({"import_module", "__import__"})
_BY_ANY_GLOBAL = _IMPORTS | {"globals", "vars", "eval", "exec", "__globals__", "f_globals", "getmodule"}
# code that reads its arguments only
_ENDS = frozenset({"torch", "metafast", "numpy", "_pytest", *sys.stdlib_module_names})


def of_the_user(module: Any) -> bool:
    """Whether a module, by its name, is neither Python's nor one that reads its arguments only."""
    return (isinstance(module, str) and module.partition(".")[0] not in _ENDS) or module == "__main__"


class Names(NamedTuple):
    """What code reads by name."""

    all: frozenset[str]  # that globals and attributes are read by, and getattr's strings
    globals: tuple[str, ...]
    imported: tuple[str, ...]  # modules


_read: weakref.WeakKeyDictionary[types.CodeType, Names] = weakref.WeakKeyDictionary()


def names_of(code: types.CodeType) -> Names:
    """The names in code and in the functions inside it."""
    found = _read.get(code)
    if found is None:
        found = _read[code] = _read_names(code)
    return found


def _read_names(code: types.CodeType) -> Names:
    named, read, imported = set(code.co_names), set(), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname in _READS_GLOBALS:
            read.add(instruction.argval)
        elif instruction.opname == "IMPORT_NAME":
            imported.add(instruction.argval)
    strings = [constant for constant in code.co_consts if isinstance(constant, str)]
    named.update(s for s in strings if s.isidentifier())
    if named & _IMPORTS:
        imported.update(strings)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inside = names_of(constant)
            named |= inside.all
            read.update(inside.globals)
            imported.update(inside.imported)
    return Names(frozenset(named), tuple(sorted(named if named & _BY_ANY_GLOBAL else read)), tuple(sorted(imported)))


def modules_named(read: Names, globals_: Mapping[str, Any]) -> list[str]:
    """The modules of the user's that code imports, relative names resolved: all that it may mean."""
    package = str(globals_.get("__package__") or "")
    parents = [package.rsplit(".", n)[0] for n in range(package.count(".") + 1)] if package else []
    names = []
    for name in read.imported:
        whole = [name] if name else []
        relative = [f"{parent}.{name}" if name else parent for parent in parents]
        names += [n for n in [*whole, *(r for r in relative if r in sys.modules)] if of_the_user(n)]
    return names
