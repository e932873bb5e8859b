"""Scores -> Plan: the best units of each axis by global index, whatever ranks hold them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import PlanError, did_you_mean
from ..layout import PER_LAYER, WITHIN, Shape, expect_axis
from ..records import SAFE_MARGIN, Plan, Scores

__all__ = ["Scope", "best_plan", "checked_sizes", "choose", "scores_of"]

Scope = Literal["layer", "network"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

Ranked = Mapping[int | None, Float[Tensor, "units"]]
"""Layer (None: shared by all layers) -> score of each unit of an axis."""


def choose(scores: Scores, *, layers: Sequence[int] | None = None, scope: str = "layer", **sizes: int) -> Plan:
    """Keep the highest-scoring units of each axis named in `sizes` (`hidden=3072, ffn=9216, heads=24`).

    Units are ranked inside each kept layer, hidden channels once for all layers. Query heads are ranked inside each
    kept kv_group, which all keep the same number; neurons of experts inside each kept expert. The score of a kv_group
    is the L2 norm of its heads' scores. Exact ties go to the lower index. layers: the layers to keep (numbers of the
    source model); None: all. scope: `network` ranks by the sum of the scores over the kept layers, which then all keep
    the same indices (as Minitron section 2.2 describes it); `layer` ranks in each layer (ModelOpt's way).
    Raises PlanError for an unknown axis or scope, an axis without scores, and a size too large or not divisible.
    """
    if scope not in SCOPES:
        raise PlanError(f"scope {scope!r} is not known.{did_you_mean(scope, SCOPES)} Use {' or '.join(SCOPES)}.")
    sizes = checked_sizes(scores.shape, sizes)

    def unit_scores(axis: str, places: Sequence[int | None]) -> Ranked:
        units = scores_of(axis, scores)
        ranked = {place: units[place] for place in places}
        return dict.fromkeys(ranked, torch.stack([*ranked.values()]).sum(0)) if scope == "network" else ranked

    plan = best_plan(scores.shape, unit_scores, layers, sizes, scores.model_hash)
    _warn_of_ties(plan)
    return plan


def scores_of(axis: str, scores: Scores) -> Ranked:
    """Return layer -> scores of an axis; scores of a kv_group are made from those of its heads.

    Raises PlanError if the axis has no scores, not one score per unit, or a score that is not finite.
    """
    measured = "heads" if axis == "kv_groups" and axis not in scores.values else axis
    for at, units in scores.values.get(measured, {}).items():
        place = axis if at is None else f"{axis} in layer {at}"
        if units.shape != (scores.shape.units(measured),):
            raise PlanError(
                f"the scores of {place} are not one for each of {scores.shape.units(measured)} units. "
                "Score the model again."
            )
        if not bool(units.isfinite().all()):
            raise PlanError(f"the scores of {place} are not all finite and cannot be ranked. Score the model again.")
    if axis in scores.values:
        return scores.values[axis]
    if axis == "kv_groups" and "heads" in scores.values:
        by_group = scores.shape.kv_groups
        return {at: units.view(by_group, -1).norm(dim=1) for at, units in scores.values["heads"].items()}
    raise PlanError(f"axis {axis} was not scored. Score it first; scored so far: {', '.join(scores.values)}.")


def checked_sizes(shape: Shape, sizes: Mapping[str, int]) -> dict[str, int]:
    """Complete `sizes` (public axis -> units) for a model of `shape`: heads and kv_groups follow from each other.

    Without grouped-query attention, cutting a head cuts its kv_group; cutting a kv_group cuts all its heads. Raises
    PlanError if the model cannot keep these sizes.
    """
    if "heads" in sizes and shape.multi_head:
        sizes = {"kv_groups": sizes["heads"], **sizes}
    sizes = shape.with_heads(sizes)
    for axis, size in sizes.items():
        expect_axis(axis)
        whole = shape.axis_size(axis)
        if not whole:
            raise PlanError(f"axis {axis} should keep {size}, but the model does not have this axis. Leave it out.")
        if not 1 <= size <= whole:
            raise PlanError(f"axis {axis} should keep {size} of {whole}. Ask for 1 to {whole}.")
    _check_heads(shape, sizes.get("heads"), sizes.get("kv_groups", shape.kv_groups))
    if sizes.get("experts", shape.experts) < shape.experts_per_token:
        raise PlanError(
            f"axis experts should keep {sizes['experts']}, but every token goes through {shape.experts_per_token}. "
            f"Keep at least {shape.experts_per_token}."
        )
    return dict(sizes)


def _check_heads(shape: Shape, heads: int | None, groups: int) -> None:
    if heads is None:
        return
    if heads % groups:
        raise PlanError(
            f"axis heads should keep {heads}, which cannot be spread evenly over {groups} kv_groups. "
            f"Keep a multiple of {groups}."
        )
    if heads > (held := shape.heads_per_group * groups):
        raise PlanError(
            f"axis heads should keep {heads}, but {groups} kv_groups hold {held}. "
            f"Keep at most that many, or keep more kv_groups."
        )


def best_plan(
    shape: Shape,
    unit_scores: Callable[[str, Sequence[int | None]], Ranked],
    layers: Sequence[int] | None,
    sizes: Mapping[str, int],
    model_hash: str = "",
) -> Plan:
    """Return the plan that keeps the best units. unit_scores: (axis, layers to choose in) -> scores in each."""
    kept_layers = tuple(range(shape.layers)) if layers is None else tuple(layers)
    plan = Plan(shape, {}, None if layers is None else kept_layers, {}, model_hash)
    for axis in sorted(sizes, key=lambda axis: axis in WITHIN):  # kv_groups before heads, experts before neurons
        each, size = _group_sizes(axis, shape, sizes)
        if each == size:
            continue
        places: Sequence[int | None] = kept_layers if axis in PER_LAYER else (None,)
        best = {at: _best(units, plan.kept_at(axis, at), each, size) for at, units in unit_scores(axis, places).items()}
        keep = {**plan.keep, axis: {at: kept for at, (kept, _) in best.items()}}
        margins = {**plan.margins, axis: {at: margin for at, (_, margin) in best.items()}}
        plan = replace(plan, keep=keep, margins=margins)
    return plan


def _group_sizes(axis: str, shape: Shape, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Return (units to keep, units) of each group of an axis; an axis without groups is one group."""
    if axis == "heads":
        return sizes[axis] // sizes.get("kv_groups", shape.kv_groups), shape.heads_per_group
    return sizes[axis], shape.axis_size(axis)


def _best(units: Float[Tensor, "units"], among: Sequence[int], each: int, size: int) -> tuple[tuple[int, ...], float]:
    """Return (kept indices ascending, smallest relative margin): the `each` best units of every group of `size`.

    among: the indices that may be kept, group by group.
    """
    index = torch.tensor(among).view(-1, size)
    ranked, order = units[index].sort(dim=1, descending=True, stable=True)
    kept = index.gather(1, order[:, :each]).flatten().sort().values
    last, first_cut = ranked[:, each - 1], ranked[:, each]
    margin = ((last - first_cut) / last.abs().clamp(min=torch.finfo(last.dtype).tiny)).min()
    return tuple(kept.tolist()), float(margin)


def _warn_of_ties(plan: Plan) -> None:
    close = [
        f"{axis}" + ("" if layer is None else f" of layer {layer}")
        for axis, by_layer in plan.margins.items()
        for layer, margin in by_layer.items()
        if margin < SAFE_MARGIN
    ]
    if close:
        warnings.warn(
            f"the cut of {', '.join(close)} has a margin below {SAFE_MARGIN:g}: another layout may keep other units",
            stacklevel=3,
        )
