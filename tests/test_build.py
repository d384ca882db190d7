"""Whether the compiled module and the sources beside the package belong together is asked at import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import metafast
from metafast import build

CSRC = Path(metafast.__file__).parent.parent / "csrc"

in_a_clone = pytest.mark.skipif(not CSRC.is_dir(), reason="no sources beside an installed wheel")


def test_the_digest_sees_names_and_contents(tmp_path):
    """A file that is changed, renamed, added or removed; nothing that is not C++."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "fill.cpp").write_text("int fill;\n")
    (tmp_path / "program.hpp").write_text("int program;\n")
    seen = [build.digest(tmp_path)]
    (tmp_path / "kernels" / "fill.cpp").write_text("int filled;\n")
    seen.append(build.digest(tmp_path))
    (tmp_path / "kernels" / "fill.cpp").rename(tmp_path / "fill.cpp")
    seen.append(build.digest(tmp_path))
    (tmp_path / "more.hpp").touch()
    seen.append(build.digest(tmp_path))
    assert len(set(seen)) == 4
    (tmp_path / "notes.txt").write_text("no source\n")
    assert build.digest(str(tmp_path)) == seen[-1]
    (tmp_path / "more.hpp").unlink()
    assert build.digest(tmp_path) == seen[2]


@in_a_clone
def test_the_build_took_the_digest_as_import_does():
    _C = pytest.importorskip("metafast._C", reason="the native backend is not built", exc_type=ImportError)
    assert build.digest(CSRC) == _C.SOURCES


def _import_beside(module: str) -> subprocess.CompletedProcess[str]:
    """`import metafast` in a new process, where `module` makes what it finds as its compiled module."""
    code = f"import sys, types; sys.modules['metafast._C'] = {module}; import metafast; print('imported')"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@in_a_clone
@pytest.mark.parametrize("attributes", ["", ", SOURCES='0123456789abcdef'"], ids=["before digests", "another build"])
def test_a_stale_module_is_refused_with_the_way_out(attributes):
    """The import says which module, of which sources, and how to build it again."""
    stale = f"types.SimpleNamespace(__file__='/somewhere/_C.so', __spec__=None{attributes})"
    done = _import_beside(stale)
    got = "0123456789ab" if attributes else "unknown"
    assert done.returncode == 1
    for part in (
        "ImportError: import metafast: /somewhere/_C.so: got a build of other C++ sources",
        f"(digest {got})",
        f"expected one of those in {CSRC} (digest {build.digest(CSRC)[:12]})",
        f"{sys.executable} -m pip install -e {CSRC.parent}",
    ):
        assert part in done.stderr


@in_a_clone
def test_a_clone_without_a_compiled_module_imports():
    done = _import_beside("None")  # as Python notes a module that must not be found
    assert (done.returncode, done.stdout) == (0, "imported\n"), done.stderr
