"""Architecture search of the papers: from a grid of shapes and a budget to a winner, with the evidence for it.

Knows: grids, budgets, costs of shapes, plans, and how to measure a candidate cut in memory. Must not know: recipes, run
folders, distillation (training comes as a function).
"""

from .choice import front, knee, rank_correlation, settled
from .halving import Curve, halving, rungs
from .latency import Conditions, FittedSpeed, Roofline, Serving, SpeedRow
from .space import COSTS, FILLED, MORE_IS_BETTER, TIMED, Candidate, Limit, Space, candidates, costs_of
from .zero_shot import zero_shot

__all__ = [
    "COSTS",
    "FILLED",
    "MORE_IS_BETTER",
    "TIMED",
    "Candidate",
    "Conditions",
    "Curve",
    "FittedSpeed",
    "Limit",
    "Roofline",
    "Serving",
    "Space",
    "SpeedRow",
    "candidates",
    "costs_of",
    "front",
    "halving",
    "knee",
    "rank_correlation",
    "rungs",
    "settled",
    "zero_shot",
]
