"""Distil the teacher into a random student, for comparison."""

from __future__ import annotations

from ...convert import read_config
from ...model import build, fill_initial
from ..context import Context
from ..stage import Result, Stage, Trained
from ..training import distil, distillation_inputs

__all__ = ["BASELINE"]


def do_baseline(context: Context) -> Result:
    """Distil the teacher into a random student of the same shape, on the same tokens."""
    context.expect_unchanged(context.untrained_student)
    config = read_config(context.untrained_student)
    recipe = context.recipe
    student = build(config, context.topology, context.dtype, recompute=recipe.recompute, spec=recipe.spec)
    fill_initial(student, context.topology, context.recipe.seed)
    tokens = distil(context, student, "baseline")
    return {**context.save_sealed(student, context.folders.model("random")), "tokens": tokens}


BASELINE = Stage(
    "baseline",
    do_baseline,
    result=Trained,
    makes=lambda run: run.model("random"),
    reads=("distill", "dtype"),
    after=("prepare", "correct", "prune"),
    wanted=lambda recipe: recipe.random_baseline,
    extra_inputs=distillation_inputs,
)
