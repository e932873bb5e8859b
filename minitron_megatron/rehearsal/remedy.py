"""Smallest change of a recipe after which a stage that was too large fits its GPUs, found by rehearsing each one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import MinitronError
from ..events import Listener, silent
from ..recipe import Recipe
from .rehearse import GIB, RankKind, Rehearsal, rehearse
from .stages import TRAINS

__all__ = ["Remedy", "advice", "smallest_change"]

RECOMPUTE = ("none", "selective", "full")
"""Values of `recompute`, from the cheapest on."""


@dataclass(frozen=True)
class Remedy:
    """Change of one key of a recipe, with which a stage fits."""

    key: str
    value: int | str
    peak: int
    """Bytes of the fullest kind of rank with it."""


def smallest_change(recipe: Recipe, found: Rehearsal, listener: Listener = silent) -> Remedy | None:
    """Return the first change, from the cheapest on, with which every kind of rank fits; None: no single one does.

    Each is rehearsed, first as the kind of rank that is fullest now. Changes that are refused, or would fail on a GPU
    in another way, are passed over.
    """
    for key, value in _changes(recipe, found.stage):
        changed = _with(recipe, key, value)
        try:
            tried = changed and rehearse(
                changed,
                gpus=found.gpus,
                gpu=found.gpu,
                memory=found.memory,
                stage=found.stage,
                kinds=lambda kinds: _nearest_first(kinds, found.worst.kind),
                stops_when_full=True,
                listener=listener,
            )
        except MinitronError:
            continue
        if tried and tried.fits:
            return Remedy(key, value, tried.worst.peak)
    return None


def advice(remedy: Remedy | None) -> str:
    """Return the sentence about the smallest change that an error ends with."""
    if remedy is None:
        return "No single change fits: of micro-batch, recomputation, teacher, tp or pp, change several."
    value = str(remedy.value).lower() if isinstance(remedy.value, bool) else remedy.value
    return (
        f"The smallest change that fits: {remedy.key}: {value} ({remedy.peak / GIB:.2f} GiB, modelled, not measured)."
    )


def _changes(recipe: Recipe, stage: str) -> Iterator[tuple[str, int | str]]:
    """Yield (key, value) of single changes, from the one that costs least time on; what the recipe has is left out."""
    layout, size = recipe.parallel, _micro_batch(recipe, stage)
    while size > 1:
        size //= 2
        yield f"{stage}.micro_batch", size
    if layout.tp > 1 and not layout.sequence_parallel:
        yield "parallel.sequence_parallel", True
    levels = RECOMPUTE[RECOMPUTE.index(recipe.recompute) + 1 :] if stage in TRAINS else ()
    yield from (("recompute", level) for level in levels)
    if stage == "distill" and recipe.distill.has_teacher:
        most = recipe.distill.teacher_window
        for window in (4 * layout.pp, layout.pp):
            if most is None or window < most:
                yield "distill.teacher_window", window
        if not recipe.distill.offload_teacher:
            yield "distill.offload_teacher", True
    yield "parallel.tp", 2 * layout.tp
    yield "parallel.pp", 2 * layout.pp


def _micro_batch(recipe: Recipe, stage: str) -> int:
    return getattr(recipe, stage).micro_batch


def _with(recipe: Recipe, key: str, value: int | str) -> Recipe | None:
    """Return the recipe with another value of a key; None: its schema refuses it."""
    *group, name = key.split(".")
    try:
        if not group:
            return recipe.replaced(**{name: value})
        return recipe.replaced(**{group[0]: getattr(recipe, group[0]).replaced(**{name: value})})
    except ValueError:
        return None


def _nearest_first(kinds: list[RankKind], worst: RankKind) -> list[RankKind]:
    """Return the kinds of rank with the one first that stood at the same place as the fullest one."""
    return sorted(kinds, key=lambda each: each.place != worst.place)
