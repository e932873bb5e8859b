"""Correct the teacher: fine-tune it on the distillation data before anything is pruned."""

from __future__ import annotations

from ...train import OBJECTIVES
from ..context import Context
from ..stage import Result, Stage, Trained
from ..training import correcting, train_in_phases

__all__ = ["CORRECT"]


def do_correct(context: Context) -> Result:
    """Fine-tune the teacher on the distillation data."""
    keys = context.recipe.correct
    assert keys is not None
    model = context.load(context.recipe.model, trains=True)
    with correcting(context, model):
        tokens = train_in_phases(context, model, OBJECTIVES[keys.objective](context.topology), keys, "correct")
    return {**context.save_sealed(model, context.folders.model("corrected")), "tokens": tokens}


CORRECT = Stage(
    "correct",
    do_correct,
    result=Trained,
    makes=lambda run: run.model("corrected"),
    reads=("correct", "dtype"),
    after=("prepare",),
    wanted=lambda recipe: recipe.corrects_first,
)
