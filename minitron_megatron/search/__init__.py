"""Which shape: the papers' search over architectures, from a grid and a budget to a winner and the evidence for it.

Knows: grids, budgets, costs of shapes, plans, how to measure a candidate that is cut in memory. Must not know: recipes,
run folders, objectives (training and evaluation come as functions).
"""

from .choice import front, knee, rank_correlation, settled
from .halving import Curve, halving, rungs
from .latency import GPUS, Conditions, FittedSpeed, Roofline, SpeedRow
from .space import COSTS, FILLED, MORE_IS_BETTER, TIMED, Candidate, Limit, Space, candidates, costs_of
from .zero_shot import zero_shot

__all__ = [
    "COSTS",
    "FILLED",
    "GPUS",
    "MORE_IS_BETTER",
    "TIMED",
    "Candidate",
    "Conditions",
    "Curve",
    "FittedSpeed",
    "Limit",
    "Roofline",
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
