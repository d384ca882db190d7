"""What all tests share: how many threads PyTorch may use while one runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """Two threads for the native backend, one for the eager one, whose threads only spin on small arrays."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is None or "backend" not in callspec.params:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1 if callspec.params["backend"] == "torch" else 2)
    yield
    torch.set_num_threads(before)
