"""Kernels that run on CUDA and that a CPU build does not have: attention and RMSNorm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .fault import DeviceFault
from .operations import Args
from .places import Places

__all__ = [
    "LowerRight",
    "attention_choice",
    "attention_flops",
    "fused_attention",
    "fused_rms_norm",
]

aten = torch.ops.aten
PLAIN, FLASH, EFFICIENT, CUDNN = 0, 1, 2, 3
"""torch's numbers of the attention kernels."""


class LowerRight:
    """Stand-in for torch's causal bias of queries at the last keys, which no mode lets be made."""

    def __init__(self, queries: int, keys: int) -> None:
        pass


def attention_choice(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: object = None, *_: object, **__: object
) -> int:
    """Choose as aten/native/transformers/cuda/sdp_utils.cpp does. cuDNN's is asked for on Hopper; the sizes and strides
    that it refuses besides do not occur."""
    grouped = query.shape[1] != key.shape[1]
    if query.dtype not in (torch.float16, torch.bfloat16) or query.shape[-1] > 256 or attn_mask is not None:
        return PLAIN if grouped else EFFICIENT
    preferred = torch._C._get_sdp_priority_order()[0] == CUDNN and torch.backends.cuda.cudnn_sdp_enabled()
    return CUDNN if preferred and query.shape[-1] <= 128 else FLASH


CAUSAL = {
    "_scaled_dot_product_flash_attention": 4,
    "_scaled_dot_product_flash_attention_backward": 11,
    "_scaled_dot_product_efficient_attention": 6,
    "_scaled_dot_product_efficient_attention_backward": 11,
    "_scaled_dot_product_cudnn_attention": 6,
    "_scaled_dot_product_cudnn_attention_backward": 14,
}
"""Kernel -> place of `is_causal` among its arguments. Kernels skip what it leaves out, and nothing of a mask."""


def attention_flops(name: str, args: Args) -> int:
    """Return the FLOPs of attention, of causal attention for queries at the last keys: two products forward, five
    backward."""
    backward = "backward" in name
    query, key = args[1:3] if backward else args[:2]
    batch, heads, queries, width = query.shape
    keys = key.shape[2]
    doubled = 2 * keys - queries if len(args) > CAUSAL[name] and args[CAUSAL[name]] else 2 * keys
    return batch * heads * queries * doubled * width * (5 if backward else 2)


def fused_attention(plain: Callable[..., Tensor], places: Places) -> Callable[..., Tensor]:
    """Return scaled_dot_product_attention that takes CUDA's kernels for fake tensors."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | LowerRight | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        at_the_end = isinstance(attn_mask, LowerRight)  # torch takes flash attention for it
        if at_the_end:
            is_causal, attn_mask = True, None
        parts = [each for each in (query, key, value, attn_mask) if isinstance(each, Tensor)]
        fakes = [isinstance(each, FakeTensor) for each in parts]
        if any(fakes) and not all(fakes):
            raise DeviceFault(f"attention of tensors on the CPU and on the GPU, at {places.here().line}")
        choice = attention_choice(query, key, value, attn_mask) if all(fakes) else PLAIN
        if choice == PLAIN:
            return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if query.shape[1] != key.shape[1] and not enable_gqa:
            heads = f"{query.shape[1]} and {key.shape[1]} heads"
            raise DeviceFault(f"attention of {heads} without enable_gqa, at {places.here().line}")
        if choice == EFFICIENT:
            return aten._scaled_dot_product_efficient_attention(
                query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
            )[0]
        if choice == CUDNN and not at_the_end:
            return aten._scaled_dot_product_cudnn_attention(
                query, key, value, None, torch.is_grad_enabled(), dropout_p, is_causal, False, scale=scale
            )[0]
        flash = aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]

    return attend


class _Context(Protocol):
    """Autograd's context, from the forward to the backward pass."""

    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _FusedNorm(torch.autograd.Function):
    """One kernel each way, as on CUDA; it saves its input and a number a row."""

    @staticmethod
    def forward(ctx: _Context, states: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(states, weight, states.new_empty((*states.shape[:-1], 1), dtype=torch.float32))
        out = torch.empty_like(states, memory_format=torch.contiguous_format)  # also in its strides of single rows
        return torch.ops.aten.mul.out(states, weight, out=out)

    @staticmethod
    def backward(ctx: _Context, *upstream: Tensor) -> tuple[Tensor, Tensor]:
        states, weight, _ = ctx.saved_tensors
        return torch.ops.aten.mul.Tensor(upstream[0], states), torch.empty_like(weight)


def fused_rms_norm(plain: Callable[..., Tensor], places: Places) -> Callable[..., Tensor]:
    """Return rms_norm that is one kernel for fake tensors, as torch's is on CUDA from 2.8 on."""

    def rms_norm(
        states: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        if not isinstance(states, FakeTensor) or weight is None or weight.dtype != states.dtype:
            return plain(states, shape, weight, eps)
        if states.device != weight.device:
            devices = f"{states.device} and {weight.device}"
            raise DeviceFault(f"rms_norm of tensors on {devices}, at {places.here().line}")
        return _FusedNorm.apply(states, weight)

    return rms_norm
