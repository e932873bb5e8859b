"""Preference pairs from answers of a run's student, or of any other model."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from ..align import AnswerSettings, PairsSummary, make_pairs
from ..convert import read_config
from ..errors import RecipeError
from ..events import Listener, silent
from ..files import file_marks
from ..forecast import with_model_folders
from ..model import check_fits
from ..parallel import Topology, fail_together
from ..recipe import Recipe, with_keys_in_errors
from .context import Context

__all__ = ["sample_pairs"]


@with_keys_in_errors()
def sample_pairs(
    recipe: Recipe,
    topology: Topology,
    settings: AnswerSettings,
    to: Path,
    *,
    model: Path | None = None,
    listener: Listener = silent,
) -> PairsSummary:
    """Write preference pairs to the file `to`, and return what they were made from. Collective over the world.

    model: Hugging Face folder that answers, with its own tokenizer; None: the run's newest student, aligned or
    distilled. What an interrupted call has sampled lies in `<to>.parts`, from which the same call goes on. Raises
    RecipeError if `to` exists or the student is not there yet.
    """
    with fail_together():
        if to.exists():
            raise RecipeError(f"{to} exists already. Remove it, or give another file.")
        recipe = with_model_folders(recipe)
        context = Context(recipe, topology, listener, {})
        folder = _who_answers(context, settings, model)
        parts = to.with_name(f"{to.name}.parts")
        mark = hashlib.sha256(json.dumps([file_marks([folder]), recipe.dtype]).encode()).hexdigest()[:16]
    summary = make_pairs(
        context.load(folder) if settings.samples else None,
        topology,
        settings,
        folder,
        to,
        parts / mark,
        seed=recipe.seed,
        run_code=recipe.evaluate.run_code,
        listener=listener,
    )
    if topology.rank == 0:
        shutil.rmtree(parts, ignore_errors=True)
    return summary


def _who_answers(context: Context, settings: AnswerSettings, model: Path | None) -> Path:
    """Return the folder of the model that answers; of the recipe's model where nothing is sampled."""
    if not settings.samples:
        if model:
            raise RecipeError("the records hold the responses, so that no model answers. Remove the model.")
        return context.recipe.model
    rounds = range(len(context.recipe.align), -1, -1)
    folder = model or next(filter(Path.is_dir, map(context.aligned, rounds)), context.aligned(0))
    if not folder.is_dir():
        raise RecipeError(f"there is no model {folder}. Run `minitron distill` first, or give another model.")
    check_fits(read_config(folder).shape, context.topology)
    return folder
