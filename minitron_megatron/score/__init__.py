"""Importance from forward passes: `Scores` of units and `DepthScores` of layers, the same at every layout.

Knows: activations, taps, statistics, and the losses that measure a network without some of its layers. Must not know:
pruning plans, recipes.
"""

from .depth import Metric, RunBatches, TokenMetric, leave_out
from .metrics import DEPTH_METRICS, DepthMetric
from .similarity import block_importance
from .sweep import score
from .taps import check_statistic

__all__ = [
    "DEPTH_METRICS",
    "DepthMetric",
    "Metric",
    "RunBatches",
    "TokenMetric",
    "block_importance",
    "check_statistic",
    "leave_out",
    "score",
]
