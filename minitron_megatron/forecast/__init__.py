"""Forecasts: check a recipe and estimate its cost, before any work begins.

Knows: recipes, shapes, the layout table. Must not know: weights, processes, what stages do.
"""

from .candidates import candidates_of, untimed_candidates
from .check import check, check_calibration, check_corpus, check_held_out, needed_calibration, needed_tokens, planned
from .check_tasks import check_evaluation, settings_folder
from .check_training import check_schedule
from .estimate import Estimate, count, estimate
from .family import FamilyEstimate, FamilyRun, check_family, estimate_family, family_runs, runs_of, saving
from .memory import WEIGHT_BYTES
from .model_folders import ModelOrigin, model_origins, with_model_folders
from .sizes import depth_sweep, rounds, student_shape
from .slurm import slurm_commands

__all__ = [
    "WEIGHT_BYTES",
    "Estimate",
    "FamilyEstimate",
    "FamilyRun",
    "ModelOrigin",
    "candidates_of",
    "check",
    "check_calibration",
    "check_corpus",
    "check_evaluation",
    "check_family",
    "check_held_out",
    "check_schedule",
    "count",
    "depth_sweep",
    "estimate",
    "estimate_family",
    "family_runs",
    "model_origins",
    "needed_calibration",
    "needed_tokens",
    "planned",
    "rounds",
    "runs_of",
    "saving",
    "settings_folder",
    "slurm_commands",
    "student_shape",
    "untimed_candidates",
    "with_model_folders",
]
