"""Head-residual merge: a head that stays takes along its difference to one that goes. Off unless asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import PlanError, did_you_mean
from ..layout import Param, Shape, axis_coords, coords, layer_of, lookup
from ..model import named_shards
from ..parallel import Topology, fail_together, gather_sequence
from ..records import Plan, Scores
from .choose import scores_of

__all__ = ["MERGES", "SIGNS", "check_merge", "merge_heads"]

MERGES = ("q", "q+o", "qkvo")
"""Which projections of a head are merged. Keys and values only where each head has its own."""

SIGNS = {"printed": 1, "reversed": -1}
"""`printed`: head + (head - partner), as the paper prints it; `reversed`: head + (partner - head), as LaCo has it."""

HeadPair = tuple[int, int]
"""(a head that stays, its partner that goes), as indices of the axis that is cut."""


def merge_heads(
    model: Any, scores: Scores, plan: Plan, topology: Topology, *, merge: str = "q", sign: str = "printed"
) -> None:
    """Changes the heads that `plan` keeps, in place, before `trim` cuts the others. Collective over the world.

    Of L heads ranked by score of which K stay, head i becomes head_i +- (head_i - head_{2K-i+1}) for i from 2K-L+1 to
    K, ranks from 1 and inside each kv_group. Source: Minitron section 2.3, whose printed lower bound 2K-L would need a
    head L+1. Raises PlanError where no heads are cut, where fewer than half of them stay, and for keys and values that
    several heads share.
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
    """The axis on which heads are cut: where each has its own key and value, a head is a kv_group."""
    return "kv_groups" if shape.heads == shape.kv_groups else "heads"


def check_merge(teacher: Shape, student: Shape, merge: str) -> None:
    """Raise PlanError where the heads of a cut cannot be merged so, from the two shapes alone."""
    if merge not in MERGES:
        raise PlanError(f"merge {merge!r} is not known.{did_you_mean(merge, MERGES)} Use {' or '.join(MERGES)}.")
    axis = _axis(teacher)
    if merge == "qkvo" and axis == "heads":
        raise PlanError("merge qkvo needs a key and a value for each head, and here several share one. Use q or q+o.")
    there, stay = teacher.heads // teacher.kv_groups, student.heads // student.kv_groups
    if axis == "kv_groups":
        there, stay = teacher.heads, student.heads
    if there == stay:
        raise PlanError("heads are to be merged, and the plan cuts none. Set prune.heads, or merge nothing.")
    if there > 2 * stay:
        raise PlanError(f"{stay} of {there} heads stay, and each can take one along. Keep half of them at least.")


def _pairs(scores: Scores, plan: Plan, layer: int) -> list[HeadPair]:
    axis = _axis(plan.shape)
    units, kept = scores_of(axis, scores)[layer], set(plan.keep[axis][layer])
    groups = [range(plan.shape.heads)]
    if axis == "heads":
        each = plan.shape.heads // plan.shape.kv_groups
        groups = [range(group * each, (group + 1) * each) for group in plan.kept_at("kv_groups", layer)]
    pairs = []
    for group in groups:
        ranked = sorted(group, key=lambda head: (head not in kept, -float(units[head]), head))
        stay, there = sum(head in kept for head in group), len(group)
        pairs += [(ranked[i - 1], ranked[2 * stay - i]) for i in range(2 * stay - there + 1, stay + 1)]
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
    """Rewrites this rank's rows of a split dim; role: which of its rows, None: all that a head has. Collective over
    tp, since a partner may lie on another rank."""
    sizes, name = shape.sizes(), param.dims[dim]
    index = axis_coords(_axis(shape), name, sizes)
    assert index is not None
    if role is not None:
        index = torch.where(coords(name, sizes)[role] >= 0, index, -1)
    rows = shard.movedim(dim, 0)
    full = gather_sequence(rows, at.tp_group) if at.tp > 1 else rows.clone()
    merged = full.clone()
    for head, partner in pairs:
        here, there = (index == head).nonzero().flatten(), (index == partner).nonzero().flatten()
        merged[here] = full[here] + sign * (full[here] - full[there])
    rows.copy_(merged[param.shard_rows(dim, sizes, at.tp_rank, at.tp)])
