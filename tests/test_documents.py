"""What the documents say of the code is so: printed text, paths, examples, versions."""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import pytest
import torch

import metafast
from metafast.passes import PASSES

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: an installed metafast goes first

from docs import walkthrough

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()
README = (ROOT / "README.md").read_text()
PROJECT = (ROOT / "pyproject.toml").read_text()


def codemap() -> list[str]:
    """The paths in the codemap's first column, from the root."""
    rows = ARCHITECTURE.split("## Codemap")[1].split("\n## ")[0].splitlines()
    cells = [row.split("|")[1] for row in rows if row.startswith("| `")]
    names = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    outside = ("csrc/", "tests/", "bench/", "docs/")
    return [name if name.startswith(outside) else f"metafast/{name}" for name in names]


# ---- ARCHITECTURE


@pytest.mark.shows()
def test_the_walkthrough_is_what_its_script_prints() -> None:
    assert walkthrough.fill(ARCHITECTURE, walkthrough.stages()) == ARCHITECTURE, (
        "run python -m docs.walkthrough ARCHITECTURE.md"
    )


def test_a_text_without_its_block_is_an_error() -> None:
    with pytest.raises(ValueError, match="got 0 blocks for 'capture', expected one under its marker"):
        walkthrough.fill("no marker", {"capture": "text"})


def test_every_pass_is_described() -> None:
    rows = "".join(f"| `{name}` | {text} |\n" for name, text in PASSES.items())
    assert f"| pass | what it does |\n|---|---|\n{rows}\n" in ARCHITECTURE


def test_the_codemap_names_nothing_that_is_not_there() -> None:
    assert [name for name in codemap() if not list(ROOT.glob(name.rstrip("/")))] == []


@pytest.mark.parametrize("folder", ["metafast", "csrc", "csrc/kernels"])
def test_the_codemap_names_every_module_and_folder(folder: str) -> None:
    named = {path for name in codemap() for path in ROOT.glob(name.rstrip("/"))}
    named |= {above for path in named for above in path.parents}
    there = [p for p in (ROOT / folder).iterdir() if p.is_dir() or p.suffix in (".py", ".pyi", ".cpp", ".hpp")]
    assert there, folder
    assert [p.name for p in there if p not in named and p.name != "__pycache__"] == []


@pytest.mark.parametrize("document", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"])
def test_files_that_a_document_names_exist(document: str) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / document).read_text(), flags=re.DOTALL | re.MULTILINE)
    spans = {span for line in text.splitlines() for span in re.findall(r"`([^`]+)`", line)}
    paths = [s for s in spans if re.fullmatch(r"[\w./*-]+(/|\.(py|md|cff|toml|txt|hpp|cpp))", s)]
    assert paths
    places = (ROOT, ROOT / "metafast", ROOT / "csrc", *(p for p in (ROOT / "metafast").iterdir() if p.is_dir()))
    missing = [s for s in paths if not any(list(place.glob(s.rstrip("/"))) for place in places)]
    assert [s for s in missing if not list(ROOT.glob(f"tests/{s}"))] == []


# ---- README and metadata


def test_the_readmes_example_runs_natively() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    scope: dict[str, object] = {}
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a FallbackWarning among them
        exec(compile(code, "README.md", "exec"), scope)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in scope["inner"].parameters())


def test_the_readme_states_the_oldest_torch_and_python() -> None:
    oldest = re.search(r'"torch>=([\d.]+)"', PROJECT)
    python = re.search(r'requires-python = ">=([\d.]+)"', PROJECT)
    assert oldest is not None and python is not None
    assert f"torch {oldest[1]} or newer" in README
    assert f"Python {python[1]} or newer" in README


def test_version_and_licence_are_the_same_everywhere() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {metafast.__version__}\n" in citation
    assert f'version = "{metafast.__version__}"' in PROJECT
    assert "license: Apache-2.0" in citation and 'license = { text = "Apache-2.0" }' in PROJECT
    assert f"## {metafast.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    title = re.search(r'^title: "(.*)"$', citation, flags=re.MULTILINE)
    assert title is not None and title[1] in README


def test_every_public_name_is_documented() -> None:
    bare = [name for name in metafast.__all__ if not (getattr(metafast, name).__doc__ or "").strip()]
    assert bare == []
    assert [name for name in metafast.__all__ if name not in README] == []
