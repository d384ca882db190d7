"""Whether the compiled module was built from the C++ sources that lie beside this package.

A clone that is installed in place takes new Python at once and new C++ only when it is built again. In between the two
halves may mean different things by the same call, so each build holds a digest of its sources, which are compared with
those in the clone; reading them takes some 2 ms. An installed wheel has no sources beside it, and one build of both.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from .errors import message

__all__ = ["digest", "require_current"]


def require_current() -> None:
    """Raises ImportError where sources beside the package are not those of the compiled module. Without one there is
    nothing to compare: calls then run on the PyTorch reference."""
    clone = Path(__file__).parent.parent
    if not os.path.isfile(clone / "csrc" / "bindings" / "module.cpp"):
        return
    try:
        from . import _C
    except ImportError:
        return
    built, now = getattr(_C, "SOURCES", "unknown"), digest(clone / "csrc")
    if built != now:
        got = f"a build of other C++ sources (digest {built[:12]})"
        expected = f"one of those in {clone / 'csrc'} (digest {now[:12]})"
        way_out = f"build again, which takes minutes: {sys.executable} -m pip install -e {clone}"
        raise ImportError(message(f"import metafast: {getattr(_C, '__file__', '_C')}", got, expected, way_out))


def digest(csrc: str | os.PathLike[str]) -> str:
    """SHA-256 over the name and the SHA-256 of every C++ file, in the order of names, as CMakeLists.txt takes it."""
    root = os.fspath(csrc)
    files = [os.path.join(at, name) for at, _, names in os.walk(root) for name in names]
    rows = []
    for file in sorted(f for f in files if f.endswith((".cpp", ".hpp"))):
        name = os.path.relpath(file, root).replace(os.sep, "/")
        with open(file, "rb") as source:
            rows.append(f"{name} {hashlib.sha256(source.read()).hexdigest()}\n")
    return hashlib.sha256("".join(rows).encode()).hexdigest()
