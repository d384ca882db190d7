"""What all tests share: how many threads PyTorch may use while one runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


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
