"""The few collectives that the rest uses, and the one that lets an error of one rank reach all of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import MinitronError

__all__ = [
    "Group",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast_object",
    "fail_together",
    "first_to_fail",
    "gather_objects",
    "gather_sequence",
    "group_rank",
    "group_size",
    "local_sequence",
    "move",
    "place_in_world",
    "scatter_sequence",
    "sum_gradient",
    "sum_over_world",
]

Group = dist.ProcessGroup


def group_rank(group: Group) -> int:
    """This process's place in `group`, from 0."""
    return dist.get_rank(group)


def group_size(group: Group) -> int:
    """How many ranks `group` has."""
    return dist.get_world_size(group)


def place_in_world() -> tuple[int, int]:
    """(this process's rank, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_reduce(tensor: Tensor, group: Group, op: str = "sum") -> Tensor:
    """Reduces `tensor` in place over `group` by `sum` or `max`, and returns it."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX, group=group)
    return tensor


def sum_gradient(tensor: Tensor, group: Group) -> Tensor:
    """`tensor`, alike on every rank of `group`, whose gradient is the sum of all ranks'."""
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

    summed: Tensor = copy_to_tensor_model_parallel_region(tensor, group)
    return summed


def sum_over_world(tensor: Tensor) -> Tensor:
    """The sum of everyone's `tensor`, in place, on every rank of the world."""
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_sequence(part: Tensor, group: Group) -> Tensor:
    """Every rank's part of dim 0, in rank order, on every rank of `group`."""
    world = dist.get_world_size(group)
    full = part.new_empty((world * part.shape[0], *part.shape[1:]))
    dist.all_gather_into_tensor(full, part.contiguous(), group=group)
    return full


def scatter_sequence(full: Tensor, group: Group) -> Tensor:
    """The sum over ranks of `full`, of which each rank gets its part of dim 0."""
    world = dist.get_world_size(group)
    part = full.new_empty((full.shape[0] // world, *full.shape[1:]))
    dist.reduce_scatter_tensor(part, full.contiguous(), group=group)
    return part


def local_sequence(full: Tensor, group: Group) -> Tensor:
    """This rank's part of dim 0 of what every rank of `group` has whole."""
    return full.chunk(dist.get_world_size(group))[dist.get_rank(group)]


def all_to_all(parts: Sequence[Tensor], sizes: Sequence[int], group: Group) -> list[Tensor]:
    """Sends `parts[r]` (equal shapes but for dim 0) to rank r; returns what came, `sizes[r]` rows from rank r."""
    if dist.get_world_size(group) == 1:
        return list(parts)
    tail = parts[0].shape[1:]
    received = parts[0].new_empty((sum(sizes), *tail))
    sent = torch.cat([part.contiguous() for part in parts])  # gloo ignores strides: contiguous or corrupted
    dist.all_to_all_single(received, sent, list(sizes), [len(part) for part in parts], group=group)
    return list(received.split(list(sizes)))


def move(
    tensor: Tensor | None,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
    source: int,
    target: int = 0,
    into: Tensor | None = None,
) -> Tensor | None:
    """The tensor of global rank `source` on global rank `target`; None on every other rank. Only these two wait.

    into: where it shall lie on the target, contiguous; by default in new memory.
    """
    me = dist.get_rank()
    if source == target:
        return tensor if me == target else None
    if me == source:
        assert tensor is not None
        dist.send(tensor.contiguous(), dst=target)  # gloo ignores strides: contiguous or corrupted
    if me != target:
        return None
    received = torch.empty(tuple(shape), dtype=dtype, device=device) if into is None else into
    assert received.is_contiguous()
    dist.recv(received, src=source)
    return received


def gather_objects(value: Any, group: Group | None = None) -> list[Any]:
    """Everyone's `value`, in rank order, on every rank of `group` (default: the world)."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [value]
    out: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(out, value, group=group)
    return out


def broadcast_object(value: Any, source: int = 0, group: Group | None = None) -> Any:
    """The `value` of group rank `source`, on every rank of `group` (default: the world)."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=group, group_src=source)
    return box[0]


def barrier(group: Group | None = None) -> None:
    """Waits for every rank of `group` (default: the world)."""
    if dist.is_initialized():
        dist.barrier(group=group)


@contextmanager
def fail_together() -> Iterator[None]:
    """Around checks that may fail on one rank alone: every rank then raises the first rank's error, and none hangs.

    Collective over the world on the way out, so that nothing inside may be. Only MinitronErrors are shared; anything
    else is raised where it is, and that rank ends.
    """
    mine: MinitronError | None = None
    try:
        yield
    except MinitronError as error:
        mine = error
    errors = [error for error in gather_objects(mine) if error is not None]
    if errors:
        raise errors[0] from mine


def first_to_fail() -> bool | None:
    """Whether no other rank has asked this before, or has kept count and is gone; None where none is joined yet. Not
    collective."""
    if not dist.is_initialized():
        return None
    try:
        return int(dist.distributed_c10d._get_default_store().add("minitron/failed", 1)) == 1
    except RuntimeError:
        return False
