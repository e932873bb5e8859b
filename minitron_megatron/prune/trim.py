"""Plan -> smaller model: trimmed shards are assigned one by one to new modules on `meta`, old ones freed or kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from ..errors import PlanError
from ..layout import SIZED_AXES, Param, Shape, expert_of, kept_rows, layer_of, lookup
from ..model import Chunk, Model, NamedShard, assign, check_fits, chunks_of, named_shards, owner_rank, rebuild, shape_of
from ..parallel import Topology, all_to_all, fail_together, move
from ..records import Plan

__all__ = ["check_cut", "trim", "trimmed_view"]

BLOCKS = 16
"""Pieces in which a parameter is cut and sent; the extra memory is a few pieces, a few times 1/16 of the parameter."""


def trim(model: Model, plan: Plan, topology: Topology) -> list[Chunk]:
    """Cut a model in place and return its chunks in the new sizes; the old modules are left empty.

    Works on any mcore GPTModel with the layout table's names. Kept units may lie unevenly over the ranks: each
    parameter is resharded in turn, and layers move to the pipeline stage that the new depth gives them. Peak memory:
    the old shards and one parameter. Collective over the world. Raises PlanError if the plan is for another shape or
    the model is wrapped, and TopologyError if the new sizes do not fit the layout.
    """
    with fail_together():
        check_cut(model, plan, topology)
    return _cut(model, plan, topology, free=True)


def trimmed_view(model: Model, plan: Plan, topology: Topology) -> list[Chunk]:
    """Return the chunks that `trim` would return, but leave the model unchanged.

    Parameters that the plan does not cut are shared with the model: measure the result, do not train it. Collective
    over the ranks that hold one copy of the model; for MoE models over the world. Call `check_cut` first: this function
    does not check the plan.
    """
    return _cut(model, plan, topology, free=False)


def check_cut(model: Model, plan: Plan, topology: Topology) -> None:
    """Raise PlanError if the plan is for another shape or the model is wrapped, and TopologyError if the new sizes do
    not fit the layout. Not collective."""
    _check(chunks_of(model), plan)
    check_fits(plan.target, topology)


def _cut(model: Model, plan: Plan, topology: Topology, *, free: bool) -> list[Chunk]:
    """Build the cut model. free: release each old shard once it is cut."""
    old_chunks, target = chunks_of(model), plan.target
    new_chunks = rebuild(old_chunks, shape_of(old_chunks[0]).resized(**_sizes(target)), topology)
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


def _check(chunks: Sequence[Chunk], plan: Plan) -> None:
    for chunk in chunks:
        if not hasattr(chunk, "decoder"):
            raise PlanError(
                f"trim needs a bare GPTModel, but this is a {type(chunk).__name__}. Unwrap it: model.module."
            )
        if unlike := shape_of(chunk).differences(plan.shape):
            raise PlanError(f"the plan cuts another model: this one has {unlike}. Score this model and choose again.")


def _sizes(shape: Shape) -> dict[str, int]:
    return {axis: shape.axis_size(axis) for axis in SIZED_AXES}


Shards = dict[tuple[str, bool], NamedShard]


def _carry(name: str, plan: Plan, old: Shards, new: Shards, topology: Topology, *, free: bool) -> None:
    """Move one trimmed parameter from the rank that held it to the rank that will. Only these two ranks take part."""
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
    """Return (shape, dtype) of the shard to move: the sender's tensor has them, and the receiver's new parameter."""
    like = tensor if tensor is not None else new[name, False].tensor
    return tuple(like.shape), like.dtype


def _source_name(name: str, plan: Plan) -> str:
    """Return the old model's name of a parameter of the new one."""
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
    """Return this rank's shard of the trimmed parameter. Collective over tp if rows change their rank.

    Works in blocks along a dim whose rows stay on their rank, so that only the old and the new shard are alive.
    """
    param, sizes, keep = lookup(shard.name), plan.shape.sizes(), plan.keep_at(layer_of(shard.name))
    old = shard.tensor.detach()
    kept = [kept_rows(param, dim, sizes, keep, expert_of(shard.name)) for dim in range(old.dim())]
    cut = [len(rows) < param.shape(sizes)[dim] for dim, rows in enumerate(kept)]
    if not any(cut):
        return old
    held = _held(param, plan.target.sizes(), topology)  # only for cut dims: an uncut dim may hold another padding
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


def _held(param: Param, sizes: Mapping[str, int], topology: Topology) -> list[Int64[Tensor, "_local_rows"]]:
    """Return, for every dim, the unsharded rows that this rank holds."""
    return [param.shard_rows(dim, sizes, topology.tp_rank, topology.tp) for dim in range(len(param.dims))]


INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Bytes per element -> integer dtype of that width."""


def _take(
    part: Shaped[Tensor, "..."], dim: int, index: Int64[Tensor, "kept"], into: Shaped[Tensor, "..."] | None = None
) -> Shaped[Tensor, "..."]:
    """Copy rows of a dim by their positions, to new memory or `into` a tensor of their shape.

    Along the last dim the elements are gathered as integers of the same width: several times as fast on a CPU as
    index_select.
    """
    index = index.to(part.device)
    if dim == 0:
        taken = part.index_select(0, index)
        return taken if into is None else into.copy_(taken)
    integer, index = INTEGERS[part.element_size()], index.expand(len(part), -1)
    if into is None:
        into = part.new_empty(index.shape)
    torch.gather(part.view(integer), 1, index, out=into.view(integer))
    return into


def _cut_dim(
    part: Tensor, dim: int, param: Param, kept: Int64[Tensor, "kept_rows"], plan: Plan, topology: Topology, into: Tensor
) -> None:
    """Keep rows of a dim; if tp splits the dim, send each row to its new rank, in order. kept: unsharded rows.

    Collective over tp unless no row changes its rank, on which all ranks agree.
    """
    me = topology.tp_rank
    old_owner = param.owner(dim, plan.shape.sizes(), topology.tp)
    new_owner = param.owner(dim, plan.target.sizes(), topology.tp)
    if old_owner is None or new_owner is None:
        _take(part, dim, kept, into)
        return
    old_owner = old_owner[kept]
    local = torch.searchsorted(_held(param, plan.shape.sizes(), topology)[dim], kept[old_owner == me])
    if torch.equal(old_owner, new_owner):
        _take(part, dim, local, into)
        return
    target, source = new_owner[old_owner == me], old_owner[new_owner == me]
    rows = _take(part, dim, local).movedim(dim, 0)
    sent = [rows[(target == rank).to(rows.device)] for rank in range(topology.tp)]
    received = all_to_all(sent, [int((source == rank).sum()) for rank in range(topology.tp)], topology.tp_group)
    for rank, from_rank in enumerate(received):
        into.movedim(dim, 0)[(source == rank).to(into.device)] = from_rank
