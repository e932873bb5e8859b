"""Plan -> smaller model: new modules on `meta` take the trimmed shards one by one, each old one freed or kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import PlanError
from ..layout import PUBLIC_AXES, Param, Shape, expert_of, kept_rows, layer_of, lookup
from ..model import NamedShard, assign, check_fits, chunks_of, config_of, named_shards, owner_rank, rebuild
from ..parallel import Topology, all_to_all, fail_together, move
from ..records import Plan

__all__ = ["check_cut", "trim", "trimmed_view"]

BLOCKS = 16
"""A parameter is cut, and sent to other ranks, in so many pieces: what that takes besides is a few times 1/16 of it."""


def trim(model: Any, plan: Plan, topology: Topology) -> list[Any]:
    """Cuts a model in place and returns its chunks in the new sizes; the old modules are left empty.

    Works on any mcore GPTModel with the layout table's names. Kept units may lie unevenly over the ranks: each
    parameter is resharded in turn, and layers move to the pipeline stage that the new depth gives them. Peak memory:
    the old shards and one parameter. Collective over the world. Raises PlanError where the plan is for another shape
    or the model is wrapped, and TopologyError where the new sizes do not fit the layout.
    """
    with fail_together():
        check_cut(model, plan, topology)
    return _cut(model, plan, topology, free=True)


def trimmed_view(model: Any, plan: Plan, topology: Topology) -> list[Any]:
    """What `trim` would give, beside a model that stays whole: to be measured, not trained, for what the cut leaves
    whole is the model's own.

    Collective over the ranks that hold one copy of the model, of a mixture over the world. Whoever calls it has
    `check_cut` say before that the plan fits.
    """
    return _cut(model, plan, topology, free=False)


def check_cut(model: Any, plan: Plan, topology: Topology) -> None:
    """Raises PlanError where the plan is for another shape or the model is wrapped, and TopologyError where the new
    sizes do not fit the layout. Not collective."""
    _check(chunks_of(model), plan)
    check_fits(plan.target, topology)


def _cut(model: Any, plan: Plan, topology: Topology, *, free: bool) -> list[Any]:
    """free: let go of each old shard once it is cut."""
    old_chunks, target = chunks_of(model), plan.target
    new_chunks = rebuild(old_chunks, config_of(old_chunks[0]).resized(**_sizes(target)), topology)
    old = {(shard.name, shard.tied_copy): shard for shard in named_shards(old_chunks)}
    new = {(shard.name, shard.tied_copy): shard for shard in named_shards(new_chunks)}
    stay = {_source_name(name, plan) for name in target.names()}
    for (name, _), shard in old.items():
        if free and name not in stay:
            _free(shard)
    for name in target.names():
        _carry(name, plan, old, new, topology, free=free)
    for key, shard in old.items():
        if shard.tied_copy:
            assign(new[key], _trimmed(shard, plan, topology))
            if free:
                _free(shard)
    return new_chunks


def _check(chunks: Sequence[Any], plan: Plan) -> None:
    for chunk in chunks:
        if not hasattr(chunk, "decoder"):
            raise PlanError(
                f"trim works on a bare GPTModel and was given {type(chunk).__name__}. Unwrap it: model.module."
            )
        shape = config_of(chunk).shape
        if shape != plan.shape:
            raise PlanError(f"the plan cuts {plan.shape}, and the model is {shape}. Score this model and choose again.")


def _sizes(shape: Shape) -> dict[str, int]:
    return {axis: shape.axis_size(axis) for axis in ("layers", *PUBLIC_AXES)}


Shards = dict[tuple[str, bool], NamedShard]


def _carry(name: str, plan: Plan, old: Shards, new: Shards, topology: Topology, *, free: bool) -> None:
    """Brings one parameter of the new model from where it was to where it belongs. Only its two homes take part."""
    source_name = _source_name(name, plan)
    source, target = owner_rank(source_name, plan.shape, topology), owner_rank(name, plan.target, topology)
    tensor: Tensor | None = None
    if topology.rank == source:
        shard = old[source_name, False]
        tensor = _trimmed(shard, plan, topology)
        if free:
            _free(shard)
    if topology.rank in (source, target):
        shape, dtype = _new_shape(name, new, tensor)
        tensor = move(tensor, shape, dtype, topology.device, source=source, target=target)
    if topology.rank == target:
        assert tensor is not None
        assign(new[name, False], tensor)


def _new_shape(name: str, new: Shards, tensor: Tensor | None) -> tuple[tuple[int, ...], torch.dtype]:
    """Of the shard that is to arrive: the sender has the tensor, the receiver its empty place."""
    place = tensor if tensor is not None else new[name, False].tensor
    return tuple(place.shape), place.dtype


def _source_name(name: str, plan: Plan) -> str:
    """The old name of a new model's parameter."""
    layer, expert = layer_of(name), expert_of(name)
    if layer is None:
        return name
    source = plan.kept_layers[layer]
    name = name.replace(f"layers.{layer}.", f"layers.{source}.", 1)
    if expert is None:
        return name
    return name.replace(f"local_experts.{expert}.", f"local_experts.{plan.kept_at('experts', source)[expert]}.", 1)


def _free(shard: NamedShard) -> None:
    shard.tensor.data = shard.tensor.data.new_empty(0)


def _trimmed(shard: NamedShard, plan: Plan, topology: Topology) -> Tensor:
    """This rank's part of the trimmed parameter, at the new sizes. Collective over tp where rows change their rank.

    Made in blocks along a dim whose rows stay on their rank, so that only the old and the new part are ever alive.
    """
    param, sizes, keep = lookup(shard.name), plan.shape.sizes(), plan.keep_at(layer_of(shard.name))
    old = shard.tensor.detach()
    kept = [kept_rows(param, dim, sizes, keep, expert_of(shard.name)) for dim in range(old.dim())]
    cut = [len(rows) < param.shape(sizes)[dim] for dim, rows in enumerate(kept)]
    if not any(cut):
        return old
    held = _held(param, plan.target.sizes(), topology)  # of a dim that stays whole not asked: padding may be theirs
    new = old.new_empty([len(rows) if cut[dim] else old.shape[dim] for dim, rows in enumerate(held)])
    if old.dim() == 1:
        _cut_dim(old, 0, param, kept[0], plan, topology, new)
        return new
    along = 1 if param.tp_dim == 0 and topology.tp > 1 else 0
    across, done = 1 - along, 0
    for block in kept[along].chunk(BLOCKS) if cut[along] else torch.arange(old.shape[along]).chunk(BLOCKS):
        place = new.narrow(along, done, len(block))
        if cut[across]:
            part = _take(old, along, block) if cut[along] else old.narrow(along, done, len(block))
            _cut_dim(part, across, param, kept[across], plan, topology, place)
        else:
            place.copy_(_take(old, along, block))
        done += len(block)
    return new


def _held(param: Param, sizes: Mapping[str, int], topology: Topology) -> list[Tensor]:
    """The unsharded rows of every dim that this rank holds."""
    return [param.shard_rows(dim, sizes, topology.tp_rank, topology.tp) for dim in range(len(param.dims))]


WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _take(part: Tensor, dim: int, index: Tensor, into: Tensor | None = None) -> Tensor:
    """Rows of a dim by their positions, in new memory or `into` a tensor of their shape.

    Along the last dim as integers of the same width: on a CPU several times as fast as index_select.
    """
    index = index.to(part.device)
    if dim == 0:
        taken = part.index_select(0, index)
        return taken if into is None else into.copy_(taken)
    words, index = WORDS[part.element_size()], index.expand(len(part), -1)
    if into is None:
        into = part.new_empty(index.shape)
    torch.gather(part.view(words), 1, index, out=into.view(words))
    return into


def _cut_dim(part: Tensor, dim: int, param: Param, kept: Tensor, plan: Plan, topology: Topology, into: Tensor) -> None:
    """Keeps rows of a dim, and where tp splits it hands each to its new rank, in order; kept: unsharded rows.

    Collective over tp unless no row changes its rank, which every rank sees alike.
    """
    me = topology.tp_rank
    was = param.owner(dim, plan.shape.sizes(), topology.tp)
    becomes = param.owner(dim, plan.target.sizes(), topology.tp)
    if was is None or becomes is None:
        _take(part, dim, kept, into)
        return
    was = was[kept]
    mine = torch.searchsorted(_held(param, plan.shape.sizes(), topology)[dim], kept[was == me])
    if torch.equal(was, becomes):
        _take(part, dim, mine, into)
        return
    goes, comes = becomes[was == me], was[becomes == me]
    rows = _take(part, dim, mine).movedim(dim, 0)
    sent = [rows[(goes == rank).to(rows.device)] for rank in range(topology.tp)]
    received = all_to_all(sent, [int((comes == rank).sum()) for rank in range(topology.tp)], topology.tp_group)
    for rank, from_rank in enumerate(received):
        into.movedim(dim, 0)[(comes == rank).to(into.device)] = from_rank
