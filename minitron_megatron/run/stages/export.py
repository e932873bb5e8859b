"""Export the student as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from ...parallel import fail_together
from ...serve import quantize_fp8
from ..context import DTYPES, Context
from ..fingerprint import carried_marks
from ..model_card import write_card
from ..stage import Model, Result, Stage

__all__ = ["EXPORT"]


class Exported(Model):
    dtype: str


def do_export(context: Context) -> Result:
    """Write the student as a Hugging Face folder, and as `export-fp8` if the recipe quantises it."""
    dtype = DTYPES[context.recipe.export.dtype]
    model = context.load(context.student)
    folder = context.folders.model("export")
    saved = context.save_sealed(model, folder, dtype, context.recipe.export.architecture)
    write_card(context, folder)  # after the checksums, since users may edit the card
    if context.recipe.export.quantize == "fp8":
        _quantize(context, folder)
    return {**saved, "dtype": context.recipe.export.dtype}


def _quantize(context: Context, folder: Path) -> None:
    """Write `export-fp8` next to the export, on rank 0."""
    keys = context.recipe.export
    corpus = context.calibration()
    samples = [corpus[number][0][None] for number in range(min(keys.quantize_samples, len(corpus)))]
    with fail_together():
        if context.topology.rank == 0:
            quantize_fp8(folder, context.folders.model("export-fp8"), samples, kv_cache=keys.kv_cache_fp8)
    context.sealed(context.folders.model("export-fp8"))


EXPORT = Stage(
    "export",
    do_export,
    result=Exported,
    makes=lambda run: run.model("export"),
    makes_too=lambda run: (run.model("export-fp8"),),
    reads=("export",),
    after=("prepare", "calibrate", "distill", "align", "evaluate"),
    extra_inputs=lambda recipe: carried_marks(recipe.student or recipe.model),
)
