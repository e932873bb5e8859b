"""The refit of the stage `prune`: the cut model's linear layers repaired, and the record of it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..files import write_json
from ..parallel import fail_together
from ..records import Plan
from ..refit import RIDGES, SiteFit, refit
from .context import Context

__all__ = ["refitted", "refitted_models", "write_refit"]


def refitted(context: Context, student: Sequence[Any], plan: Plan) -> list[SiteFit]:
    """Repair the cut model in place, as the recipe says; returns nothing where it says none.

    The model before its repair is written to `trimmed`, so that the stage `evaluate` can measure what the cut alone
    costs. The model that was cut is loaded once more, for it is what the layers aim at. Collective over the world.
    """
    keys, folder = context.recipe.prune, context.folders.model("trimmed")
    if keys.refit == "none":
        with fail_together():
            if context.topology.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
        return []
    context.save(student, folder)
    return refit(
        student,
        context.load_uncut(),
        plan,
        context.calibration_batches(keys.refit_samples),
        context.topology,
        method=keys.refit,
        ridges=RIDGES if keys.refit_ridge is None else (keys.refit_ridge,),
        listener=context.listener,
    )


def write_refit(context: Context, fits: Sequence[SiteFit]) -> dict[str, Any]:
    """Write the errors of each layer on the first rank, before the folder `pruned` is sealed; returns what the stage
    leaves of them."""
    if not fits:
        return {}
    if context.topology.rank == 0:
        write_json(context.folders.refit, [asdict(fit) for fit in fits])
    repaired = sum(fit.ridge is not None for fit in fits)
    tokens = max(fit.tokens for fit in fits)
    files = context.sealed(context.folders.model("trimmed"))
    return {
        "trimmed_files": files,
        "refit": {"method": context.recipe.prune.refit, "tokens": tokens, "layers": len(fits), "repaired": repaired},
    }


def refitted_models(context: Context) -> dict[str, str]:
    """Name of a model in the summary -> its folder, for what the stage `prune` left."""
    if context.recipe.prune.refit == "none":
        return {"pruned": "pruned"}
    return {"pruned": "trimmed", "refitted": "pruned"}
