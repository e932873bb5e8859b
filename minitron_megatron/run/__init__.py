"""Runs: execute the stages of a recipe in order, skip finished ones, resume interrupted ones, rerun changed ones.

Knows: recipes, forecasts, the run folder. Must not know: terminals, plots, command lines.
"""

from .bench import bench
from .context import DTYPES, Context
from .engine import Step, dry_run, planned_marks, results, run, search_task, wanted
from .evaluation import check_export, evaluate_folder
from .handover import hand_over
from .sampling import sample_pairs
from .shared import SharedStages
from .stage import Stage
from .stages import STAGES

__all__ = [
    "DTYPES",
    "STAGES",
    "Context",
    "SharedStages",
    "Stage",
    "Step",
    "bench",
    "check_export",
    "dry_run",
    "evaluate_folder",
    "hand_over",
    "planned_marks",
    "results",
    "run",
    "sample_pairs",
    "search_task",
    "wanted",
]
