"""What the documents say of the code is so: printed text, paths, examples, versions."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))  # last: an installed metafast goes first

from docs import walkthrough

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()


def codemap() -> list[str]:
    """The paths in the codemap's first column, from the root."""
    rows = ARCHITECTURE.split("## Codemap")[1].split("\n## ")[0].splitlines()
    cells = [row.split("|")[1] for row in rows if row.startswith("| `")]
    names = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    outside = ("csrc/", "tests/", "bench/", "docs/")
    return [name if name.startswith(outside) else f"metafast/{name}" for name in names]


# ---- ARCHITECTURE


def test_the_walkthrough_is_what_its_script_prints() -> None:
    assert walkthrough.fill(ARCHITECTURE, walkthrough.stages()) == ARCHITECTURE, (
        "run python -m docs.walkthrough ARCHITECTURE.md"
    )


def test_a_text_without_its_block_is_an_error() -> None:
    with pytest.raises(ValueError, match="got 0 blocks for 'capture', expected one under its marker"):
        walkthrough.fill("no marker", {"capture": "text"})


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
