"""Facts of operations that need no device: their names, kinds and bytes, and what collectives are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._ops import OpOverload

__all__ = [
    "DYNAMIC",
    "INDEXING",
    "JOINS",
    "NCCL_DTYPES",
    "NO_KERNEL",
    "PRODUCTS",
    "PUT",
    "Args",
    "Kwargs",
    "bytes_of",
    "group_of",
    "has_mask",
    "is_itself",
    "name_of",
    "starts_early",
]

aten = torch.ops.aten

Args = tuple[Any, ...]
"""Arguments of an operation as torch gives them to a mode, untyped: its schema says what each is."""
Kwargs = dict[str, Any]

NCCL_DTYPES = {
    *(torch.int8, torch.uint8, torch.bool, torch.int32, torch.int64, torch.float16, torch.bfloat16),
    *(torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2),
}
DYNAMIC = {
    *(aten.nonzero.default, aten._unique2.default, aten.unique_consecutive.default),
    *(aten.masked_select.default, aten.unique_dim.default),
}
"""Operations whose result has a size that depends on numbers: the host waits for them."""
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
PUT = (aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "addmm_", "mv", "dot"}
JOINS = {"cat", "stack"}
NO_KERNEL = {
    *("detach", "alias", "view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze"),
    *("_unsafe_view", "as_strided", "split", "chunk", "unbind", "narrow", "split_with_sizes", "_reshape_alias"),
    *("set_", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "lift_fresh"),
}


def starts_early(func: OpOverload, args: Args, kwargs: Kwargs) -> bool:
    """Return whether a collective is waited for later: its argument `async_op`."""
    names = [each.name for each in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    return "async_op" in names and bool(given.get("async_op", True))


def name_of(func: OpOverload) -> str:
    return func._schema.name.split("::")[1]


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def has_mask(indices: Sequence[object]) -> bool:
    return any(isinstance(each, Tensor) and each.dtype in (torch.bool, torch.uint8) for each in indices)


def group_of(value: object) -> dist.ProcessGroup | None:
    """Return the process group that an argument of a collective is; None: it is none."""
    if not isinstance(value, torch.ScriptObject):
        return None
    try:
        return dist.ProcessGroup.unbox(value)
    except RuntimeError:
        return None


def is_itself(target: Tensor, source: object) -> bool:
    """Return whether both are the same view: torch copies nothing, as at the end of `a[some] += b`."""
    if not isinstance(source, Tensor) or target.untyped_storage()._cdata != source.untyped_storage()._cdata:
        return False
    return (target.shape, target.stride(), target.storage_offset(), target.dtype) == (
        *(source.shape, source.stride(), source.storage_offset(), source.dtype),
    )
