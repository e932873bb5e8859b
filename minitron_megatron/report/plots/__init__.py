"""Plots of a run as PNG files: losses, comparison of models, importance, pruning, depth, search, throughput,
alignment, rehearsals and studies.

Knows: lines of metrics, rows of a summary, and plain mappings of scores, kept units and margins. Must not know: where
they come from. A plot with nothing to show writes no file and returns None; matplotlib is imported when one is drawn.
"""

from .comparison import overlaid, sizes
from .cuts import margins, shares
from .depth import DepthCurves, depth_curves
from .losses import bars, loss_curves
from .preferences import preference_curves
from .scores import ByLayer, importance
from .search import search_front, search_ranks
from .study import plot_study
from .throughput import BenchRow, plot_bench

__all__ = [
    "BenchRow",
    "ByLayer",
    "DepthCurves",
    "bars",
    "depth_curves",
    "importance",
    "loss_curves",
    "margins",
    "overlaid",
    "plot_bench",
    "plot_study",
    "preference_curves",
    "search_front",
    "search_ranks",
    "shares",
    "sizes",
]
