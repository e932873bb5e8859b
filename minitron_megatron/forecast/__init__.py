"""Forecasts: check a recipe and estimate its cost, before any work begins.

Knows: recipes, shapes, the layout table. Must not know: weights, processes, run folders.
"""

from .candidates import candidates_of, untimed_candidates
from .check import check, check_corpus, needed_tokens, planned
from .check_tasks import check_evaluation, settings_folder
from .estimate import Estimate, count, estimate
from .memory import WEIGHT_BYTES
from .sizes import depth_sweep, measures_depth, rounds, scores_wanted
from .slurm import slurm_commands

__all__ = [
    "WEIGHT_BYTES",
    "Estimate",
    "candidates_of",
    "check",
    "check_corpus",
    "check_evaluation",
    "count",
    "depth_sweep",
    "estimate",
    "measures_depth",
    "needed_tokens",
    "planned",
    "rounds",
    "scores_wanted",
    "settings_folder",
    "slurm_commands",
    "untimed_candidates",
]
