"""The refit of the stage `prune`, and of the candidates of a search: cut models repaired, and the record of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict

from ..data import Batch
from ..events import Listener, silent
from ..files import write_json
from ..layout import Shape
from ..model import Chunk, shape_of
from ..parallel import fail_together
from ..records import Plan
from ..refit import RIDGES, SharedMoments, SiteFit, refit, shared_sites
from .context import Context, Result

__all__ = ["refit_candidate", "refitted", "refitted_models", "repair_of", "write_refit"]


def refitted(context: Context, student: list[Chunk], plan: Plan) -> list[SiteFit]:
    """Repair the cut model in place, as the recipe says; returns nothing where it says none.

    The model before its repair is written to `trimmed`, so that the stage `evaluate` can measure what the cut alone
    costs. The model that was cut is loaded once more, for it is what the layers aim at. Collective over the world.
    """
    folder = context.folders.model("trimmed")
    if context.recipe.prune.refit == "none":
        with fail_together():
            if context.topology.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
        return []
    context.save(student, folder)
    return _repaired(context, student, context.load_prune_source(), plan, _samples(context), context.listener)


def refit_candidate(context: Context, student: list[Chunk], plan: Plan) -> None:
    """Repair a candidate of a search in place, if the recipe refits; nothing is written. Collective over the world."""
    if context.recipe.prune.refit != "none":
        _repaired(context, student, context.load_prune_source(), plan, _samples(context))


def repair_of(
    context: Context, teacher: list[Chunk], candidates: Sequence[Shape]
) -> Callable[[list[Chunk], Plan], None] | None:
    """The repair of candidates of one teacher, on samples that are drawn once; None where the recipe wants none. What
    their refits have in common is computed once. Collective over the world."""
    keys = context.recipe.prune
    if keys.refit == "none":
        return None
    batches = _samples(context)
    sites = shared_sites(keys.refit, shape_of(teacher[0]), candidates)
    shared = SharedMoments(teacher, batches, context.topology, sites) if sites else None

    def repair(student: list[Chunk], plan: Plan) -> None:
        _repaired(context, student, teacher, plan, batches, shared=shared)

    return repair


def _samples(context: Context) -> list[Batch]:
    return context.calibration_batches(context.recipe.prune.refit_samples)


def _repaired(
    context: Context,
    student: list[Chunk],
    teacher: list[Chunk],
    plan: Plan,
    batches: Sequence[Batch],
    listener: Listener = silent,
    shared: SharedMoments | None = None,
) -> list[SiteFit]:
    keys = context.recipe.prune
    assert keys.refit != "none"
    ridges = RIDGES if keys.refit_ridge is None else (keys.refit_ridge,)
    return refit(
        student,
        teacher,
        plan,
        batches,
        context.topology,
        method=keys.refit,
        ridges=ridges,
        shared=shared,
        listener=listener,
    )


def write_refit(context: Context, fits: Sequence[SiteFit]) -> Result:
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
