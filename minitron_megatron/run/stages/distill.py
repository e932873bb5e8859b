"""Distil the teacher into the student."""

from __future__ import annotations

from ..context import Context
from ..stage import Result, Stage, Trained
from ..training import distil, distillation_inputs

__all__ = ["DISTILL"]


def do_distill(context: Context) -> Result:
    """Distil the teacher into the pruned student, into `distill.start`, or into the recipe's `student`."""
    student = context.load(context.recipe.distill.start or context.untrained_student, trains=True)
    tokens = distil(context, student, "distill")
    return {**context.save_sealed(student, context.folders.model("distilled")), "tokens": tokens}


DISTILL = Stage(
    "distill",
    do_distill,
    result=Trained,
    makes=lambda run: run.model("distilled"),
    reads=("distill", "dtype"),
    after=("prepare", "correct", "prune"),
    extra_inputs=distillation_inputs,
)
