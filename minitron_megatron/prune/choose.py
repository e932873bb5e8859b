"""Scores -> Plan: the best units of each axis, by global index, before any process is asked where they live."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import PlanError, did_you_mean
from ..layout import PUBLIC_AXES, Shape
from ..records import Plan, Scores

__all__ = ["SAFE_MARGIN", "check_sizes", "choose"]

SAFE_MARGIN = 1e-5
"""Below this relative margin, another order of additions could choose another unit."""


def choose(scores: Scores, *, layers: Sequence[int] | None = None, **sizes: int) -> Plan:
    """Keeps the highest-scoring units of each axis named in `sizes` (`hidden=3072, ffn=9216, heads=24`).

    Neurons and heads are ranked inside each kept layer, heads inside their kv_group, as many in each; hidden channels
    once for all. Exact ties go to the lower index. layers: the layers that stay (source numbering); None: all.
    Raises PlanError for an unknown axis, one without scores, and a size too large or not divisible.
    """
    shape = scores.shape
    check_sizes(shape, sizes)
    kept_layers = tuple(range(shape.layers)) if layers is None else tuple(layers)
    keep: dict[str, dict[int | None, tuple[int, ...]]] = {}
    margins: dict[str, dict[int | None, float]] = {}
    for axis, size in sizes.items():
        if size == shape.axis_size(axis):
            continue
        if axis not in scores.values:
            raise PlanError(f"axis {axis} was not scored. Score {', '.join(sizes)} first.")
        groups = shape.kv_groups if axis == "heads" else 1
        keep[axis], margins[axis] = {}, {}
        for layer, units in scores.values[axis].items():
            if layer is None or layer in kept_layers:
                keep[axis][layer], margins[axis][layer] = _best(units, size, groups)
    plan = Plan(shape, keep, None if layers is None else kept_layers, margins, scores.model_hash)
    _warn_of_ties(plan)
    return plan


def check_sizes(shape: Shape, sizes: Mapping[str, int]) -> None:
    """Raises PlanError where a model of `shape` cannot keep `sizes` (public axis -> units)."""
    for axis, size in sizes.items():
        if axis not in PUBLIC_AXES:
            raise PlanError(
                f"axis {axis!r} is not known.{did_you_mean(axis, PUBLIC_AXES)} Known: {', '.join(PUBLIC_AXES)}."
            )
        whole = shape.axis_size(axis)
        if not 1 <= size <= whole:
            raise PlanError(f"axis {axis} should keep {size} of {whole}. Ask for 1 to {whole}.")
    if "heads" in sizes and sizes["heads"] % shape.kv_groups:
        raise PlanError(
            f"axis heads should keep {sizes['heads']}, which cannot be spread evenly over {shape.kv_groups} kv_groups. "
            f"Keep a multiple of {shape.kv_groups}."
        )


def _best(units: Tensor, size: int, groups: int) -> tuple[tuple[int, ...], float]:
    """(kept indices ascending, smallest relative margin) of the `size` best units, as many from each of `groups`."""
    by_group = units.view(groups, -1)
    order = by_group.argsort(dim=1, descending=True, stable=True)
    each = size // groups
    offset = torch.arange(groups).unsqueeze(1) * by_group.shape[1]
    kept = (order[:, :each] + offset).flatten().sort().values
    ranked = by_group.gather(1, order)
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
