"""Export a run's student, finished or still training, to a new folder in Hugging Face's or Megatron-LM's format."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

from ..convert import read_config, save_hf
from ..errors import CheckpointError, RecipeError
from ..events import Listener, silent
from ..forecast import with_model_folders
from ..model import Checkpoints, build, check_finite, check_megatron_lm, load_weights, save_megatron_lm
from ..parallel import Topology, fail_together
from ..recipe import Recipe
from .context import DTYPES, Context
from .engine import results, wanted
from .fingerprint import fingerprint
from .stages import STAGES

__all__ = ["hand_over"]

Format = Literal["hf", "megatron"]


def hand_over(
    recipe: Recipe,
    topology: Topology,
    to: Path,
    *,
    checkpoint: str = "",
    form: Format = "hf",
    listener: Listener = silent,
) -> Path:
    """Write the student to the new folder `to` and return the path its weights came from. Collective over the world.

    checkpoint: a training checkpoint of distillation: `newest`, `best` (lowest validation loss) or a step, of the last
    phase that has any; empty: the finished student. The run may be running meanwhile. Raises RecipeError if there is
    no such student, and CheckpointError if Megatron-LM cannot express it.
    """
    with fail_together():
        if to.exists():
            raise RecipeError(f"{to} already exists. Give another folder with --to.")
        recipe = with_model_folders(recipe)
        names = [stage.name for stage in wanted(recipe)]
        until = names[names.index("distill") - 1] if checkpoint else names[names.index("evaluate") - 1]
        done = results(recipe, until)
        context = Context(recipe, topology, listener, done, partial(fingerprint, STAGES["distill"], done=done))
        if form == "megatron":
            check_megatron_lm(read_config(context.untrained_student if checkpoint else context.student))
    if checkpoint:
        context.expect_unchanged(context.untrained_student)
        with fail_together():
            path, identity = _find(context, checkpoint)
            student = build(read_config(context.untrained_student), topology, context.dtype)
        load_weights(path, student, topology, identity)
        check_finite(student, str(path), "Give another checkpoint.")
    else:
        path = context.student
        student = context.load(path)
    if form == "megatron":
        save_megatron_lm(student, to, topology, tokenizer=context.student_files.resolve())
    else:
        save_hf(
            student,
            to,
            topology,
            dtype=DTYPES[recipe.export.dtype],
            files_from=context.student_files,
            architecture=recipe.export.architecture,
            listener=listener,
        )
        context.stop_at_turns(to)
    return path


def _find(context: Context, which: str) -> tuple[Path, str]:
    """Return (path, identity) of a checkpoint."""
    for folder, mark in reversed(context.phase_checkpoints):
        store = Checkpoints(folder, context.topology)
        steps = {str(step): path for step, path in store.steps().items()}
        if not steps:
            continue
        named = {"newest": store.newest_first()[0], "best": store.best()} | steps
        path = named.get(which)
        if path is None:
            raise RecipeError(f"there is no checkpoint {which}. Use newest, best or one of {', '.join(steps)}.")
        return path, mark
    raise CheckpointError(
        f"{context.recipe.out} has no checkpoints of distillation: without `distill.retain` they are removed when it "
        "is done. Omit --checkpoint to export the finished student."
    )
