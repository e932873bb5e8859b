"""Plain data with save and load: importance scores, pruning plans and summaries; the same file at every layout.

Knows: axes, layers, indices. Must not know: models, processes, batches.
"""

from .depth import DepthScores
from .plan import SAFE_MARGIN, Plan
from .scores import Scores, Statistic
from .shape import read_shape
from .summary import Row, read_summary

__all__ = ["SAFE_MARGIN", "DepthScores", "Plan", "Row", "Scores", "Statistic", "read_shape", "read_summary"]
