"""Plan -> smaller model: new modules on `meta` adopt the trimmed shards one by one, each old one freed at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import PlanError
from ..layout import Shape, kept_rows, layer_of, lookup
from ..model import NamedShard, adopt, chunks_of, config_of, home_stage, named_shards, rebuild
from ..parallel import Topology, all_to_all, fail_together, move
from ..records import Plan

__all__ = ["trim"]


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
    for (name, _), shard in old.items():
        layer = layer_of(name)
        if layer is not None and layer not in plan.kept_layers:
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
    return {axis: shape.axis_size(axis) for axis in ("layers", "hidden", "ffn", "heads", "kv_groups")}


Shards = dict[tuple[str, bool], NamedShard]


def _carry(name: str, plan: Plan, old: Shards, new: Shards, topology: Topology) -> None:
    """Brings one parameter of the new model from where it was to where it belongs. Only its two stages take part."""
    source_name = _source_name(name, plan)
    source = home_stage(source_name, plan.shape, topology)
    target = home_stage(name, plan.target, topology)
    tensor: Tensor | None = None
    if topology.pp_rank == source:
        shard = old[source_name, False]
        tensor = _trimmed(shard, plan, topology)
        _free(shard)
    if topology.pp_rank in (source, target):
        at = [topology.rank_at(stage, topology.tp_rank, topology.dp_rank) for stage in (source, target)]
        shape, dtype = _new_shape(name, new, tensor)
        tensor = move(tensor, shape, dtype, topology.device, source=at[0], target=at[1])
    if topology.pp_rank == target:
        assert tensor is not None
        adopt(new[name, False], tensor)


def _new_shape(name: str, new: Shards, tensor: Tensor | None) -> tuple[tuple[int, ...], torch.dtype]:
    """Of the shard that is to arrive: the sender has the tensor, the receiver its empty place."""
    place = tensor if tensor is not None else new[name, False].tensor
    return tuple(place.shape), place.dtype


def _source_name(name: str, plan: Plan) -> str:
    """The old name of a new model's parameter."""
    layer = layer_of(name)
    if layer is None:
        return name
    return name.replace(f"layers.{layer}.", f"layers.{plan.kept_layers[layer]}.", 1)


def _free(shard: NamedShard) -> None:
    shard.tensor.data = shard.tensor.data.new_empty(0)


def _trimmed(shard: NamedShard, plan: Plan, topology: Topology) -> Tensor:
    """This rank's part of the trimmed parameter, at the new sizes. Collective over tp where rows change their rank."""
    param, keep = lookup(shard.name), plan.keep_at(layer_of(shard.name))
    old_sizes, new_sizes = plan.shape.sizes(), plan.target.sizes()
    tensor = shard.tensor.detach()
    for dim in range(len(param.dims)):
        kept = kept_rows(param, dim, old_sizes, keep)
        if len(kept) == param.shape(old_sizes)[dim]:
            continue
        owners = param.owner(dim, old_sizes, topology.tp)
        if owners is None:
            tensor = tensor.index_select(dim, kept.to(tensor.device))
            continue
        becomes = param.owner(dim, new_sizes, topology.tp)
        assert becomes is not None
        held = param.shard_rows(dim, old_sizes, topology.tp_rank, topology.tp)
        tensor = _reshard(tensor, dim, kept, held, owners[kept], becomes, topology)
    return tensor


def _reshard(
    tensor: Tensor, dim: int, kept: Tensor, held: Tensor, was: Tensor, becomes: Tensor, topology: Topology
) -> Tensor:
    """Keeps rows of a split dim and hands each to its new rank, in order.

    kept: unsharded rows that stay; held: those that this rank has; was, becomes: the rank of each kept row. Collective
    over tp unless no row changes its rank, which every rank sees alike.
    """
    me = topology.tp_rank
    mine = torch.searchsorted(held, kept[was == me]).to(tensor.device)
    rows = tensor.index_select(dim, mine)
    if torch.equal(was, becomes):
        return rows
    rows = rows.movedim(dim, 0)
    goes, comes = becomes[was == me], was[becomes == me]
    parts = [rows[(goes == rank).to(rows.device)] for rank in range(topology.tp)]
    counts = [int((comes == rank).sum()) for rank in range(topology.tp)]
    received = all_to_all(parts, counts, topology.tp_group)
    out = rows.new_empty((len(comes), *rows.shape[1:]))
    for rank, part in enumerate(received):
        out[(comes == rank).to(rows.device)] = part
    return out.movedim(0, dim).contiguous()
