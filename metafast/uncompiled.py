"""A graph break for torch.compile.

Imported only while it traces, for `torch.compiler.disable` loads all of dynamo, which takes over a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["run"]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def run(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `function` outside of what is compiled."""
    return function(*args, **kwargs)
