"""What all tests share: how many threads PyTorch may use while one runs, and which passes are left out."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "leave these passes out (metafast/passes.py), here and in every process that a test starts"
    parser.addoption("--without", metavar="PASS[,PASS...]", default=None, help=text)


def pytest_configure(config: pytest.Config) -> None:
    names = config.getoption("--without")
    if names is not None:
        os.environ["METAFAST_WITHOUT"] = names  # read where metafast is imported


def pytest_runtest_setup(item: pytest.Item) -> None:
    from metafast.passes import PASSES, left_out

    shown = {name for marker in item.iter_markers("shows") for name in marker.args or PASSES}
    if missing := shown & left_out():
        pytest.skip(f"shows what {', '.join(sorted(missing))} does")


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """One thread where both backends are compared: on small arrays PyTorch's threads only spin.

    That the native backend gives the same bits on more threads is what test_invariants.py tests.
    """
    callspec = getattr(request.node, "callspec", None)
    if callspec is None or "backend" not in callspec.params:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
