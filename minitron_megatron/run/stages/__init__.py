"""Stages of a run, one file each: what a stage reads, does and makes."""

from __future__ import annotations

from ...registry import Registry
from ..stage import Stage
from .align import round_stage
from .baseline import BASELINE
from .calibrate import CALIBRATE
from .correct import CORRECT
from .distill import DISTILL
from .evaluate import EVALUATE
from .export import EXPORT
from .prepare import PREPARE
from .prune import PRUNE
from .score import SCORE
from .search import SEARCH

__all__ = ["STAGES", "round_stage"]

STAGES: Registry[Stage] = Registry(
    "stage",
    {
        stage.name: stage
        for stage in (PREPARE, CALIBRATE, CORRECT, SCORE, SEARCH, PRUNE, DISTILL, BASELINE, EVALUATE, EXPORT)
    },
)
"""Stages by name, in the order in which they run; a plugin's come last. Rounds of alignment, of which a recipe may have
any number, come before `evaluate` (`round_stage`)."""
