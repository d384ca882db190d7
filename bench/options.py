"""What options of the benchmarks' commands may be, said before anything is measured; imports no numpy and no torch."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

PICTURES = ("eps", "jpeg", "jpg", "pdf", "png", "ps", "svg", "tif", "tiff", "webp")  # what matplotlib writes


def positive(text: str) -> int:
    """A whole number from 1 up."""
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {value}, expected 1 or more")
    return value


def writable(text: str) -> Path:
    """A file that can be written; folders above it that are not there are made when it is."""
    path = Path(text)
    if os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"got {text}, a folder, expected a file")
    nearest = next(place for place in path.absolute().parents if os.path.exists(place))
    if not os.path.isdir(nearest) or not os.access(nearest, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"got {text}, but nothing can be written in {nearest}; give another place")
    return path


def picture(text: str) -> Path:
    """A file that can be written, of a format that matplotlib draws; PNG where it has no suffix."""
    suffix = Path(text).suffix[1:].lower()
    if suffix and suffix not in PICTURES:
        raise argparse.ArgumentTypeError(f"got a picture of format {suffix!r}, expected one of {', '.join(PICTURES)}")
    return writable(text)
