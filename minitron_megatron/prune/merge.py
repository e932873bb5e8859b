"""Head-residual merge: a kept head absorbs its difference to a removed one. Off by default."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import PlanError, did_you_mean
from ..layout import Param, Shape, axis_coords, coords, layer_of, lookup
from ..model import Model, named_shards
from ..parallel import Topology, fail_together, gather_sequence
from ..records import Plan, Scores
from .choose import scores_of

__all__ = ["MERGES", "SIGNS", "Merge", "Sign", "check_merge", "merge_heads"]

Merge = Literal["q", "q+o", "qkvo"]
"""Projections to merge. `qkvo` needs a key and a value for each query head."""

MERGES: tuple[Merge, ...] = get_args(Merge)

Sign = Literal["printed", "reversed"]
"""`printed`: head + (head - partner), as in the Minitron paper; `reversed`: head + (partner - head), as in LaCo."""

SIGNS: Mapping[str, int] = dict(zip(get_args(Sign), (1, -1), strict=True))

HeadPair = tuple[int, int]
"""(kept head, its removed partner), as indices of the axis that is cut."""


def merge_heads(
    model: Model, scores: Scores, plan: Plan, topology: Topology, *, merge: str = "q", sign: str = "printed"
) -> None:
    """Change the heads that `plan` keeps, in place, before `trim` removes the others. Collective over the world.

    With L heads ranked by score and K kept, head i becomes head_i +- (head_i - head_{2K-i+1}) for i from 2K-L+1 to K;
    ranks count from 1 inside each kv_group. Source: Minitron section 2.3, whose printed lower bound 2K-L would need a
    head L+1. Raises PlanError if no heads are cut, if fewer than half are kept, and for keys and values that several
    heads share.
    """
    with fail_together():
        if sign not in SIGNS:
            raise PlanError(f"sign {sign!r} is not known.{did_you_mean(sign, SIGNS)} Use {' or '.join(SIGNS)}.")
        check_merge(plan.shape, plan.target, merge)
        pairs = {layer: _pairs(scores, plan, layer) for layer in plan.kept_layers}
    leaves = {"linear_qkv.weight": 0, "linear_qkv.bias": 0} | ({"linear_proj.weight": 1} if "o" in merge else {})
    for shard in named_shards(model):
        dim = leaves.get(".".join(shard.name.split(".")[-2:]))
        layer = layer_of(shard.name)
        if dim is not None and layer in pairs:
            role = "q" if merge in ("q", "q+o") and dim == 0 else None
            _merge(shard.tensor.data, lookup(shard.name), dim, role, pairs[layer], SIGNS[sign], plan.shape, topology)


def _axis(shape: Shape) -> str:
    """Return the axis on which heads are cut."""
    return "kv_groups" if shape.multi_head else "heads"


def check_merge(teacher: Shape, student: Shape, merge: str) -> None:
    """Raise PlanError if the heads of this cut cannot be merged; only the two shapes are needed."""
    if merge not in MERGES:
        raise PlanError(f"merge {merge!r} is not known.{did_you_mean(merge, MERGES)} Use {' or '.join(MERGES)}.")
    axis = _axis(teacher)
    if merge == "qkvo" and axis == "heads":
        raise PlanError(
            "merge qkvo needs a key and a value for each head, but here several heads share one. Use q or q+o."
        )
    total, kept = teacher.heads_per_group, student.heads_per_group
    if axis == "kv_groups":
        total, kept = teacher.heads, student.heads
    if total == kept:
        raise PlanError("heads are to be merged, but the plan cuts no heads. Cut heads, or merge nothing.")
    if total > 2 * kept:
        raise PlanError(f"only {kept} of {total} heads are kept, and each can absorb one. Keep at least half of them.")


def _pairs(scores: Scores, plan: Plan, layer: int) -> list[HeadPair]:
    axis = _axis(plan.shape)
    units, kept = scores_of(axis, scores)[layer], set(plan.keep[axis][layer])
    groups = [range(plan.shape.heads)]
    if axis == "heads":
        each = plan.shape.heads_per_group
        groups = [range(group * each, (group + 1) * each) for group in plan.kept_at("kv_groups", layer)]
    pairs = []
    for group in groups:
        ranked = sorted(group, key=lambda head: (head not in kept, -float(units[head]), head))
        stay, total = sum(head in kept for head in group), len(group)
        pairs += [(ranked[i - 1], ranked[2 * stay - i]) for i in range(2 * stay - total + 1, stay + 1)]
    return pairs


def _merge(
    shard: Tensor,
    param: Param,
    dim: int,
    role: str | None,
    pairs: list[HeadPair],
    sign: int,
    shape: Shape,
    at: Topology,
) -> None:
    """Rewrite this rank's rows of a split dim. role: the rows to merge; None: all rows of a head.

    Collective over tp, since a partner may lie on another rank.
    """
    sizes, name = shape.sizes(), param.dims[dim]
    index = axis_coords(_axis(shape), name, sizes)
    assert index is not None
    if role is not None:
        index = torch.where(coords(name, sizes)[role] >= 0, index, -1)
    rows = shard.movedim(dim, 0)
    full = gather_sequence(rows, at.tp_group) if at.tp > 1 else rows.clone()
    merged = full.clone()
    for head, partner in pairs:
        own, other = (index == head).nonzero().flatten(), (index == partner).nonzero().flatten()
        merged[own] = full[own] + sign * (full[own] - full[other])
    rows.copy_(merged[param.shard_rows(dim, sizes, at.tp_rank, at.tp)])
