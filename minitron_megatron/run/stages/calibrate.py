"""Tokenize the calibration text, where it is not that of distillation."""

from __future__ import annotations

from typing_extensions import TypedDict

from ...data import places
from ...files import file_marks
from ...forecast import needed_calibration
from ...parallel import broadcast_object, fail_together
from ...recipe import Recipe
from ..context import Context
from ..stage import Result, Stage
from .prepare import Source, tokenized, with_chat

__all__ = ["CALIBRATE"]


class Calibration(TypedDict):
    sources: dict[str, Source]


def do_calibrate(context: Context) -> Result:
    """Tokenize one corpus per source of `score.sources` on rank 0."""
    made: dict[str, Source] = {}
    with fail_together():
        if context.topology.rank == 0:
            needed = needed_calibration(context.recipe)
            for number, source in enumerate(context.recipe.score.sources):
                prefix = context.folders.calibration / f"{number}-{source.name}"
                enough = needed[number] if needed else None
                made[prefix.name] = tokenized(context, source, prefix, validation=0.0, enough=enough)
    return {"sources": broadcast_object(made)}


def calibration_inputs(recipe: Recipe) -> object:
    """Return the sources, marks of their files, and the tokens that are needed of each."""
    sources = recipe.score.sources
    files = file_marks(path for source in sources for path in places(source.paths))
    asked = [source.deciding() for source in sources]
    return with_chat(recipe.model, sources, [asked, files, needed_calibration(recipe)])


CALIBRATE = Stage(
    "calibrate",
    do_calibrate,
    result=Calibration,
    makes=lambda run: run.calibration,
    reads=("model", "data", "seed"),
    wanted=lambda recipe: bool(recipe.score.sources),
    extra_inputs=calibration_inputs,
    keeps=lambda run, mark: run.unfinished(run.calibration),
)
