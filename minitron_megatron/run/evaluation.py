"""What a recipe says of a folder: how good the model in it is, and whether an export is the student."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..convert import check_folder, read_config
from ..data import Batch
from ..errors import RecipeError
from ..events import Listener, silent
from ..forecast import check_evaluation
from ..model import check_fits
from ..parallel import Topology, fail_together
from ..recipe import Recipe
from .context import DTYPES, Context
from .engine import results
from .measure_tasks import measured_row

__all__ = ["check_export", "evaluate_folder"]

CHECKED_TOKENS = 256
"""Enough to tell: every layer and every vocabulary entry has its say in each."""


def evaluate_folder(recipe: Recipe, topology: Topology, folder: Path, *, listener: Listener = silent) -> dict[str, Any]:
    """The row of any Hugging Face folder that has the tokenizer of the recipe's model. Collective over the world.

    The harness's own results go to `evaluation/<folder's name>.json`. Raises RecipeError where the text is not prepared
    yet, or the vocabularies differ.
    """
    with fail_together():
        shape, vocab = read_config(folder).shape, read_config(recipe.model).shape.vocab
        if shape.vocab != vocab:
            raise RecipeError(
                f"{folder} has a vocabulary of {shape.vocab}, and {recipe.model} one of {vocab}: losses a token of "
                "different tokenizers do not compare. Give a model with this tokenizer."
            )
        check_fits(shape, topology)
        check_evaluation(recipe, folder)
        context = Context(recipe, topology, listener, results(recipe, "prepare"), lambda other: "")
    return measured_row(context, folder.resolve().name, folder, context.held_out())


def check_export(recipe: Recipe, topology: Topology, *, listener: Listener = silent) -> float:
    """The largest difference between the logits of the student, rounded as the export is, and those of transformers
    reading the export. Collective over the world. Raises RecipeError where it is not exported yet."""
    with fail_together():
        context = Context(recipe, topology, listener, results(recipe, "export"), lambda other: "")
    context.expect_unchanged(context.folders.model("export"))
    student = context.load(context.folders.model("distilled"), torch.float32)
    for chunk in student:
        for weight in chunk.parameters():
            weight.data.copy_(weight.data.to(DTYPES[recipe.export.dtype]))
    tokens = context.calibration()[0][0][None, :CHECKED_TOKENS]
    batch = Batch(tokens, tokens, torch.ones_like(tokens, dtype=torch.bool)).to(topology.device)
    return check_folder(student, context.folders.model("export"), batch, topology)
