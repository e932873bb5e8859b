"""Forward passes of a model -> Scores and DepthScores: which units and layers matter, the same at every layout.

Knows: activations, taps, statistics, the losses that a network without some layers is measured by. Must not know: what
is cut, recipes.
"""

from .depth import Metric, RunBatches, leave_out
from .similarity import block_importance
from .sweep import score
from .taps import check_statistic

__all__ = ["Metric", "RunBatches", "block_importance", "check_statistic", "leave_out", "score"]
