"""Evaluate any Hugging Face folder by a recipe, and compare an export with the student."""

from __future__ import annotations

from pathlib import Path

import torch

from ..convert import check_folder, read_config
from ..data import Batch
from ..errors import RecipeError
from ..events import Listener, silent
from ..forecast import check_evaluation, with_model_folders
from ..model import check_fits
from ..parallel import Topology, fail_together
from ..recipe import Recipe, with_keys_in_errors
from .context import DTYPES, Context
from .engine import results
from .measure_tasks import Measured, measured_row

__all__ = ["check_export", "evaluate_folder"]

CHECKED_TOKENS = 256
"""Tokens whose logits are compared. Few suffice, since every layer and vocabulary entry takes part in each."""


@with_keys_in_errors()
def evaluate_folder(recipe: Recipe, topology: Topology, folder: Path, *, listener: Listener = silent) -> Measured:
    """Return the summary row of a Hugging Face folder that has the tokenizer of the recipe's model.

    The harness's own results are written to `evaluation/<folder's name>.json`. Raises RecipeError if the text is not
    prepared yet, or the vocabularies differ. Collective over the world.
    """
    with fail_together():
        recipe = with_model_folders(recipe)
        shape, vocab = read_config(folder).shape, read_config(recipe.model).shape.vocab
        if shape.vocab not in (vocab, recipe.student and read_config(recipe.student).shape.vocab):
            raise RecipeError(
                f"{folder} has a vocabulary of {shape.vocab}, but {recipe.model} has one of {vocab}: losses per token "
                "of different tokenizers cannot be compared. Give a model with the same tokenizer."
            )
        check_fits(shape, topology)
        check_evaluation(recipe, folder)
        context = Context(recipe, topology, listener, results(recipe, "prepare"))
    return measured_row(context, folder.resolve().name, folder, context.held_out())


def check_export(recipe: Recipe, topology: Topology) -> float:
    """Return the largest difference between the student's logits, with weights rounded as in the export, and those of
    transformers on the export. Collective over the world. Raises RecipeError if there is no export yet."""
    with fail_together():
        recipe = with_model_folders(recipe)
        context = Context(recipe, topology, silent, results(recipe, "export"))
    context.expect_unchanged(context.folders.model("export"))
    student = context.load(context.student, torch.float32)
    for chunk in student:
        for weight in chunk.parameters():
            weight.data.copy_(weight.data.to(DTYPES[recipe.export.dtype]))
    tokens = context.calibration()[0][0][None, :CHECKED_TOKENS]
    batch = Batch(tokens, tokens, torch.ones_like(tokens, dtype=torch.bool)).to(topology.device)
    return check_folder(student, context.folders.model("export"), batch, topology)
