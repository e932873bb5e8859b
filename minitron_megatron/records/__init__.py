"""Plain data with save and load: importance scores, pruning plans and summaries; the same file at every layout.

Knows: axes, layers, indices, how numbers add up. Must not know: models, processes, batches.
"""

from .depth import DepthScores
from .plan import SAFE_MARGIN, Plan
from .scores import Scores
from .shape import read_shape
from .statistic import REDUCTIONS, Reduction, Statistic
from .status import RunStatus, StageState, read_status
from .summary import Row, read_summary

__all__ = [
    "REDUCTIONS",
    "SAFE_MARGIN",
    "DepthScores",
    "Plan",
    "Reduction",
    "Row",
    "RunStatus",
    "Scores",
    "StageState",
    "Statistic",
    "read_shape",
    "read_status",
    "read_summary",
]
