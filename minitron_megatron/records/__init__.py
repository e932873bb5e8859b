"""What is measured and what is decided, as plain data that saves and loads: the same file at every layout.

Knows: axes, layers, indices. Must not know: models, processes, batches.
"""

from .plan import Plan
from .scores import Scores, Statistic

__all__ = ["Plan", "Scores", "Statistic"]
