"""The inner loop of gradient-based meta-learning, compiled once and replayed natively for all tasks and steps."""

from .build import require_current
from .errors import FallbackWarning, MetafastError, NonFiniteError, NonFiniteWarning
from .fast_weights import FastWeights
from .inner_loop import InnerLoop
from .updates import SGD, UpdateRule

__all__ = [
    "SGD",
    "FallbackWarning",
    "FastWeights",
    "InnerLoop",
    "MetafastError",
    "NonFiniteError",
    "NonFiniteWarning",
    "UpdateRule",
]

__version__ = "0.1.0"

require_current()
