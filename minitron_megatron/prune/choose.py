"""Scores -> Plan: the best units of each axis, by global index, before any process is asked where they live."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import PlanError, did_you_mean
from ..layout import PER_LAYER, PUBLIC_AXES, WITHIN, Shape
from ..records import Plan, Scores

__all__ = ["SAFE_MARGIN", "SCOPES", "best_plan", "checked_sizes", "choose", "scores_of"]

SAFE_MARGIN = 1e-5
"""Below this relative margin, another order of additions could choose another unit."""

SCOPES = ("layer", "network")

Ranked = Mapping[int | None, Tensor]
"""Layer (None: shared) -> what each unit of an axis is worth: [units]."""


def choose(scores: Scores, *, layers: Sequence[int] | None = None, scope: str = "layer", **sizes: int) -> Plan:
    """Keeps the highest-scoring units of each axis named in `sizes` (`hidden=3072, ffn=9216, heads=24`).

    Units are ranked inside each kept layer, hidden channels once for all. Query heads are ranked inside each kv_group
    that stays, as many in each; neurons of experts inside each expert that stays. A kv_group is worth the L2 norm of
    its heads. Exact ties go to the lower index. layers: the layers that stay (source numbering); None: all.
    scope: `network` ranks by the sum of the scores over the kept layers, which then all keep the same indices (the
    words of Minitron section 2.2; ModelOpt ranks by `layer`).
    Raises PlanError for an unknown axis or scope, an axis without scores, and a size too large or not divisible.
    """
    if scope not in SCOPES:
        raise PlanError(f"scope {scope!r} is not known.{did_you_mean(scope, SCOPES)} Use {' or '.join(SCOPES)}.")
    sizes = checked_sizes(scores.shape, sizes)

    def worth(axis: str, places: Sequence[int | None]) -> Ranked:
        units = scores_of(axis, scores)
        ranked = {place: units[place] for place in places}
        return dict.fromkeys(ranked, torch.stack([*ranked.values()]).sum(0)) if scope == "network" else ranked

    plan = best_plan(scores.shape, worth, layers, sizes, scores.model_hash)
    _warn_of_ties(plan)
    return plan


def scores_of(axis: str, scores: Scores) -> Ranked:
    """Layer -> scores of an axis; PlanError where there are none, not one for each unit, or one that ranks nothing
    because it is not finite. A kv_group's are made from its heads'."""
    measured = "heads" if axis == "kv_groups" and axis not in scores.values else axis
    for at, units in scores.values.get(measured, {}).items():
        place = axis if at is None else f"{axis} in layer {at}"
        if units.shape != (scores.shape.units(measured),):
            raise PlanError(f"the scores of {place} are not one for each of {scores.shape.units(measured)} units.")
        if not bool(units.isfinite().all()):
            raise PlanError(f"the scores of {place} are not all finite, and rank nothing. Score it again.")
    if axis in scores.values:
        return scores.values[axis]
    if axis == "kv_groups" and "heads" in scores.values:
        by_group = scores.shape.kv_groups
        return {at: units.view(by_group, -1).norm(dim=1) for at, units in scores.values["heads"].items()}
    raise PlanError(f"axis {axis} was not scored. Score it first; {', '.join(scores.values)} were.")


def checked_sizes(shape: Shape, sizes: Mapping[str, int]) -> dict[str, int]:
    """`sizes` (public axis -> units) for a model of `shape`, where a head with a key and a value of its own takes them
    along, and a kv_group all its heads. Raises PlanError where the model cannot keep them."""
    if "heads" in sizes and shape.heads == shape.kv_groups:
        sizes = {"kv_groups": sizes["heads"], **sizes}
    if "kv_groups" in sizes:
        sizes = {**sizes, "heads": sizes.get("heads", shape.heads // shape.kv_groups * sizes["kv_groups"])}
    for axis, size in sizes.items():
        if axis not in PUBLIC_AXES:
            raise PlanError(
                f"axis {axis!r} is not known.{did_you_mean(axis, PUBLIC_AXES)} Known: {', '.join(PUBLIC_AXES)}."
            )
        whole = shape.axis_size(axis)
        if not whole:
            raise PlanError(f"axis {axis} should keep {size}, and the model has none. Leave it out.")
        if not 1 <= size <= whole:
            raise PlanError(f"axis {axis} should keep {size} of {whole}. Ask for 1 to {whole}.")
    _check_heads(shape, sizes.get("heads"), sizes.get("kv_groups", shape.kv_groups))
    if sizes.get("experts", shape.experts) < shape.experts_per_token:
        raise PlanError(
            f"axis experts should keep {sizes['experts']}, and every token goes through {shape.experts_per_token}. "
            f"Keep {shape.experts_per_token} at least."
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
    if heads > shape.heads // shape.kv_groups * groups:
        raise PlanError(
            f"axis heads should keep {heads}, and {groups} kv_groups hold {shape.heads // shape.kv_groups * groups}. "
            f"Keep that many at most, or more kv_groups."
        )


def best_plan(
    shape: Shape,
    worth: Callable[[str, Sequence[int | None]], Ranked],
    layers: Sequence[int] | None,
    sizes: Mapping[str, int],
    model_hash: str = "",
) -> Plan:
    """The plan that keeps the units worth most; worth: (axis, places where it is chosen) -> scores at each."""
    kept_layers = tuple(range(shape.layers)) if layers is None else tuple(layers)
    plan = Plan(shape, {}, None if layers is None else kept_layers, {}, model_hash)
    for axis in sorted(sizes, key=lambda axis: axis in WITHIN):  # what others lie in comes first
        each, there = _each(axis, shape, sizes)
        if each == there:
            continue
        places: Sequence[int | None] = kept_layers if axis in PER_LAYER else (None,)
        best = {at: _best(units, plan.kept_at(axis, at), each, there) for at, units in worth(axis, places).items()}
        keep = {**plan.keep, axis: {at: kept for at, (kept, _) in best.items()}}
        margins = {**plan.margins, axis: {at: margin for at, (_, margin) in best.items()}}
        plan = replace(plan, keep=keep, margins=margins)
    return plan


def _each(axis: str, shape: Shape, sizes: Mapping[str, int]) -> tuple[int, int]:
    """(how many units stay, how many there are) in each group of an axis, of which there may be one."""
    if axis == "heads":
        return sizes[axis] // sizes.get("kv_groups", shape.kv_groups), shape.heads // shape.kv_groups
    return sizes[axis], shape.axis_size(axis)


def _best(units: Tensor, among: Sequence[int], each: int, there: int) -> tuple[tuple[int, ...], float]:
    """(kept indices ascending, smallest relative margin) of the `each` best units of every group of `there`, among
    those given."""
    index = torch.tensor(among).view(-1, there)
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
            f"the cut of {', '.join(close)} has a margin below {SAFE_MARGIN:g}: another layout may keep another unit",
            stacklevel=3,
        )
