"""What is measured and what is decided, as plain data that saves and loads: the same file at every layout.

Knows: axes, layers, indices. Must not know: models, processes, batches.
"""

from .depth import DepthScores
from .plan import Plan
from .scores import Scores, Statistic

__all__ = ["DepthScores", "Plan", "Scores", "Statistic"]
