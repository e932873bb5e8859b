"""The recipe of a run: its keys, its stages, what each stage reads, what is done and what must be done again.

Knows: the schema, the order of the stages, the run folder. Must not know: terminals, plots, command lines.
"""

from .bench import bench
from .estimate import Estimate, estimate
from .evaluation import check_export, evaluate_folder
from .handover import hand_over
from .load import load_recipe
from .run import Step, dry_run, run, search_task
from .schema import Recipe, json_schema
from .slurm import slurm_commands
from .stages import STAGES
from .starter import starter_recipe

__all__ = [
    "STAGES",
    "Estimate",
    "Recipe",
    "Step",
    "bench",
    "check_export",
    "dry_run",
    "estimate",
    "evaluate_folder",
    "hand_over",
    "json_schema",
    "load_recipe",
    "run",
    "search_task",
    "slurm_commands",
    "starter_recipe",
]
