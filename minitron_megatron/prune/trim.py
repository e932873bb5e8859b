"""Plan -> smaller model: new modules on `meta` adopt the trimmed shards one by one, each old one freed at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import PlanError
from ..layout import PUBLIC_AXES, Param, Shape, expert_of, kept_rows, layer_of, lookup
from ..model import NamedShard, adopt, chunks_of, config_of, home, named_shards, rebuild
from ..parallel import Topology, all_to_all, fail_together, move
from ..records import Plan

__all__ = ["trim"]

BLOCKS = 16
"""A parameter is cut, and sent to other ranks, in so many pieces: what that takes besides is a few times 1/16 of it."""


def trim(model: Any, plan: Plan, topology: Topology) -> list[Any]:
    """Cuts a model in place and returns its chunks in the new sizes; the old modules are left empty.

    Works on any mcore GPTModel with the layout table's names. Kept units may lie unevenly over the ranks: each
    parameter is resharded in turn, and layers move to the pipeline stage that the new depth gives them. Peak memory:
    the old shards and one parameter. Collective over the world. Raises PlanError where the plan is for another shape
    or the model is wrapped, and TopologyError where the new sizes do not fit the layout.
    """
    old_chunks = chunks_of(model)
    with fail_together():
        _check(old_chunks, plan)
        config = config_of(old_chunks[0])
        target = plan.target
        new_chunks = rebuild(old_chunks, config.resized(**_sizes(target)), topology)
    old = {(shard.name, shard.second_home): shard for shard in named_shards(old_chunks)}
    new = {(shard.name, shard.second_home): shard for shard in named_shards(new_chunks)}
    stay = {_source_name(name, plan) for name in target.names()}
    for (name, _), shard in old.items():
        if name not in stay:
            _free(shard)
    for name in target.names():
        _carry(name, plan, old, new, topology)
    for key, shard in old.items():
        if shard.second_home:
            adopt(new[key], _trimmed(shard, plan, topology))
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


def _carry(name: str, plan: Plan, old: Shards, new: Shards, topology: Topology) -> None:
    """Brings one parameter of the new model from where it was to where it belongs. Only its two homes take part."""
    source_name = _source_name(name, plan)
    source, target = home(source_name, plan.shape, topology), home(name, plan.target, topology)
    tensor: Tensor | None = None
    if topology.rank == source:
        shard = old[source_name, False]
        tensor = _trimmed(shard, plan, topology)
        _free(shard)
    if topology.rank in (source, target):
        shape, dtype = _new_shape(name, new, tensor)
        tensor = move(tensor, shape, dtype, topology.device, source=source, target=target)
    if topology.rank == target:
        assert tensor is not None
        adopt(new[name, False], tensor)


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

    Made in blocks along a dim that is not split, so that only the old and the new part are ever alive.
    """
    param, sizes, keep = lookup(shard.name), plan.shape.sizes(), plan.keep_at(layer_of(shard.name))
    old = shard.tensor.detach()
    kept = [kept_rows(param, dim, sizes, keep, expert_of(shard.name)) for dim in range(old.dim())]
    cut = {dim for dim, rows in enumerate(kept) if len(rows) < param.shape(sizes)[dim]}
    if not cut:
        return old
    if old.dim() == 1:
        return _cut_dim(old, 0, param, kept[0], plan, topology)
    along = 1 if param.tp_dim == 0 else 0
    rows = kept[along] if along in cut else torch.arange(old.shape[along])
    new, done = None, 0
    for block in rows.chunk(BLOCKS):
        part = old.index_select(along, block.to(old.device))
        if 1 - along in cut:
            part = _cut_dim(part, 1 - along, param, kept[1 - along], plan, topology)
        if new is None:
            new = part.new_empty([len(rows) if dim == along else size for dim, size in enumerate(part.shape)])
        new.narrow(along, done, len(block)).copy_(part)
        done += len(block)
    assert new is not None
    return new


def _cut_dim(part: Tensor, dim: int, param: Param, kept: Tensor, plan: Plan, topology: Topology) -> Tensor:
    """Keeps rows of a dim, and where tp splits it hands each to its new rank, in order; kept: unsharded rows.

    Collective over tp unless no row changes its rank, which every rank sees alike.
    """
    me = topology.tp_rank
    was = param.owner(dim, plan.shape.sizes(), topology.tp)
    becomes = param.owner(dim, plan.target.sizes(), topology.tp)
    if was is None or becomes is None:
        return part.index_select(dim, kept.to(part.device))
    was = was[kept]
    held = param.shard_rows(dim, plan.shape.sizes(), me, topology.tp)
    mine = part.index_select(dim, torch.searchsorted(held, kept[was == me]).to(part.device))
    if torch.equal(was, becomes):
        return mine
    mine, goes, comes = mine.movedim(dim, 0), becomes[was == me], was[becomes == me]
    sent = [mine[(goes == rank).to(mine.device)] for rank in range(topology.tp)]
    received = all_to_all(sent, [int((comes == rank).sum()) for rank in range(topology.tp)], topology.tp_group)
    out = mine.new_empty((len(comes), *mine.shape[1:]))
    for rank, rows in enumerate(received):
        out[(comes == rank).to(out.device)] = rows
    return out.movedim(0, dim)
