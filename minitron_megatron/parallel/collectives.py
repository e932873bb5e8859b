"""Collectives, and `fail_together`, which raises one rank's error on all ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from ..errors import MinitronError

__all__ = [
    "Group",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast_object",
    "device_backend",
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

T = TypeVar("T")


def device_backend() -> str:
    """Return the backend with which the world's ranks exchange tensors of their device: `nccl`, or `gloo` on a CPU."""
    backends = dict(pair.split(":") for pair in dist.get_backend_config().split(","))
    return backends["cuda"]


def group_rank(group: Group) -> int:
    """Return this process's rank in `group`, from 0."""
    return dist.get_rank(group)


def group_size(group: Group) -> int:
    """Return the number of ranks of `group`."""
    return dist.get_world_size(group)


def place_in_world() -> tuple[int, int]:
    """Return (this process's global rank, world size); (0, 1) where torch.distributed is not initialised."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_reduce(tensor: Shaped[Tensor, "*axes"], group: Group, op: str = "sum") -> Shaped[Tensor, "*axes"]:
    """Reduce `tensor` in place over `group` by `sum` or `max`, and return it."""
    if dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX, group=group)
    return tensor


def sum_gradient(tensor: Shaped[Tensor, "*axes"], group: Group) -> Shaped[Tensor, "*axes"]:
    """Return `tensor`, which is equal on every rank of `group`; its gradient is summed over the ranks."""
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

    summed: Tensor = copy_to_tensor_model_parallel_region(tensor, group)
    return summed


def sum_over_world(tensor: Shaped[Tensor, "*axes"]) -> Shaped[Tensor, "*axes"]:
    """Sum `tensor` over the world, in place, and return it on every rank."""
    if dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_sequence(part: Shaped[Tensor, "local_rows *axes"], group: Group) -> Shaped[Tensor, "rows *axes"]:
    """All-gather along dim 0: every rank's part, in rank order, on every rank of `group`."""
    world = dist.get_world_size(group)
    full = part.new_empty((world * part.shape[0], *part.shape[1:]))
    dist.all_gather_into_tensor(full, part.contiguous(), group=group)
    return full


def scatter_sequence(full: Shaped[Tensor, "rows *axes"], group: Group) -> Shaped[Tensor, "local_rows *axes"]:
    """Reduce-scatter along dim 0: each rank gets its part of the sum of `full` over `group`."""
    world = dist.get_world_size(group)
    part = full.new_empty((full.shape[0] // world, *full.shape[1:]))
    dist.reduce_scatter_tensor(part, full.contiguous(), group=group)
    return part


def local_sequence(full: Shaped[Tensor, "rows *axes"], group: Group) -> Shaped[Tensor, "local_rows *axes"]:
    """Return this rank's part of dim 0 of a tensor that every rank of `group` holds whole."""
    return full.chunk(dist.get_world_size(group))[dist.get_rank(group)]


def all_to_all(
    parts: Sequence[Shaped[Tensor, "_rows *axes"]], sizes: Sequence[int], group: Group
) -> list[Shaped[Tensor, "_rows *axes"]]:
    """Send `parts[r]` to rank r; return the received parts, `sizes[r]` rows of rank r."""
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
    """Return the tensor of global rank `source` on global rank `target`, None on other ranks. Only these two ranks
    wait.

    into: contiguous tensor that receives it on the target; by default a new one.
    """
    rank = dist.get_rank()
    if source == target:
        return tensor if rank == target else None
    if rank == source:
        assert tensor is not None
        dist.send(tensor.contiguous(), dst=target)  # gloo ignores strides: contiguous or corrupted
    if rank != target:
        return None
    received = torch.empty(tuple(shape), dtype=dtype, device=device) if into is None else into
    assert received.is_contiguous()
    dist.recv(received, src=source)
    return received


def gather_objects(value: T, group: Group | None = None) -> list[T]:
    """Return the `value` of every rank, in rank order, on every rank of `group` (default: the world)."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return [value]
    out = [value] * dist.get_world_size(group)
    dist.all_gather_object(out, value, group=group)
    return out


def broadcast_object(value: object, source: int = 0, group: Group | None = None) -> Any:
    """Return the `value` of group rank `source` on every rank of `group` (default: the world)."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, group=group, group_src=source)
    return box[0]


def barrier(group: Group | None = None) -> None:
    """Wait for every rank of `group` (default: the world)."""
    if dist.is_initialized():
        dist.barrier(group=group)


@contextmanager
def fail_together() -> Iterator[None]:
    """Raise the error of the first rank that fails inside the block on every rank, so that no rank hangs.

    For checks that may fail on some ranks only. Leaving the block is collective over the world, so nothing inside it
    may be. Only MinitronErrors are shared; any other exception is raised on its own rank, which ends.
    """
    local: MinitronError | None = None
    try:
        yield
    except MinitronError as error:
        local = error
    errors = [error for error in gather_objects(local) if error is not None]
    if errors:
        raise errors[0] from local


def first_to_fail() -> bool | None:
    """Return whether this rank is the first to call this, by a counter in the store of torch.distributed.

    False as well where the store's rank has gone; None before torch.distributed is initialised. Not collective.
    """
    if not dist.is_initialized():
        return None
    try:
        return int(dist.distributed_c10d._get_default_store().add("minitron/failed", 1)) == 1
    except RuntimeError:
        return False
