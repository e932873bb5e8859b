"""A student of a run, at work or done, as a folder for somebody else: Hugging Face's or Megatron-LM's."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

from ..convert import read_config, save_hf
from ..errors import CheckpointError, RecipeError
from ..events import Listener, silent
from ..model import Checkpoints, build, check_finite, check_megatron_lm, load_weights, save_megatron_lm
from ..parallel import Topology, fail_together
from ..recipe import Recipe, prefixes
from .context import DTYPES, Context
from .engine import results
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
    """Writes the student to the new folder `to` and returns where its weights were read. Collective over the world.

    checkpoint: of distillation: `newest`, `best` (least validation loss) or a step, of the last phase that has any;
    none: what the stage left. The run may be at work meanwhile. Raises RecipeError where there is no such student, and
    CheckpointError where Megatron-LM cannot express it.
    """
    with fail_together():
        if to.exists():
            raise RecipeError(f"{to} is there already. Give another folder with --to.")
        context = Context(
            recipe, topology, listener, results(recipe, "prune" if checkpoint else "distill"), lambda other: ""
        )
        if form == "megatron":
            check_megatron_lm(read_config(context.folders.model("pruned" if checkpoint else "distilled")))
    if checkpoint:
        context.expect_unchanged(context.folders.model("pruned"))
        with fail_together():
            path, identity = _find(context, checkpoint)
            student = build(read_config(context.folders.model("pruned")), topology, context.dtype)
        load_weights(path, student, topology, identity)
        check_finite(student, str(path), "Give another checkpoint.")
    else:
        path = context.folders.model("distilled")
        student = context.load(path)
    if form == "megatron":
        save_megatron_lm(student, to, topology, tokenizer=recipe.model.resolve())
    else:
        save_hf(
            student,
            to,
            topology,
            dtype=DTYPES[recipe.export.dtype],
            files_from=recipe.model,
            architecture=recipe.export.architecture,
            listener=listener,
        )
    return path


def _find(context: Context, which: str) -> tuple[Path, str]:
    """(checkpoint, identity)."""
    mark_of = partial(fingerprint, STAGES["distill"], done=context.done)
    for recipe in reversed(prefixes(context.recipe)):
        mark = mark_of(recipe)
        store = Checkpoints(context.folders.checkpoints / mark[:16], context.topology)
        there = {str(step): path for step, path in store.steps().items()}
        if not there:
            continue
        named = {"newest": store.newest_first()[0], "best": store.best()} | there
        path = named.get(which)
        if path is None:
            raise RecipeError(f"there is no checkpoint {which}. There are newest, best and {', '.join(there)}.")
        return path, mark
    raise CheckpointError(
        f"{context.recipe.out} has no checkpoints of distillation: they go when it is done, but with `distill.retain`. "
        "Leave --checkpoint out for the finished student."
    )
