"""Kernels that run on CUDA and that a CPU build does not have: attention, RMSNorm, and SwiGLU by torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .fault import DeviceFault
from .places import Places

__all__ = [
    "LowerRight",
    "attention_choice",
    "attention_flops",
    "fused_attention",
    "fused_rms_norm",
    "swiglu_kernels",
]

aten = torch.ops.aten
PLAIN, FLASH, EFFICIENT = 0, 1, 2
"""torch's numbers of the attention kernels."""


class LowerRight:
    """Stand-in for torch's causal bias of queries at the last keys, which no mode lets be made."""

    def __init__(self, queries: int, keys: int) -> None:
        pass


def attention_choice(query: Tensor, key: Tensor, value: Tensor, attn_mask: object = None, *_: Any, **__: Any) -> int:
    """Choose as aten/native/transformers/cuda/sdp_utils.cpp does on an H100."""
    grouped = query.shape[1] != key.shape[1]
    if query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256 and attn_mask is None:
        return FLASH
    return PLAIN if grouped else EFFICIENT


CAUSAL = {
    "_scaled_dot_product_flash_attention": 4,
    "_scaled_dot_product_flash_attention_backward": 11,
    "_scaled_dot_product_efficient_attention": 6,
    "_scaled_dot_product_efficient_attention_backward": 11,
}
"""Kernel -> place of `is_causal` among its arguments. Kernels skip what it leaves out, and nothing of a mask."""


def attention_flops(name: str, args: Sequence[Any]) -> int:
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
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if isinstance(attn_mask, LowerRight):
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
        flash = aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]

    return attend


class _FusedNorm(torch.autograd.Function):
    """One kernel each way, as on CUDA; it saves its input and a number a row."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(states, weight, states.new_empty((*states.shape[:-1], 1), dtype=torch.float32))
        return torch.ops.aten.mul.Tensor(states, weight)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor]:
        states, weight, _ = ctx.saved_tensors
        return torch.ops.aten.mul.Tensor(upstream[0], states), torch.empty_like(weight)


def fused_rms_norm(plain: Callable[..., Tensor], places: Places) -> Callable[..., Tensor]:
    """Return rms_norm that is one kernel for fake tensors, as torch's is on CUDA from 2.8 on."""

    def rms_norm(states: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        if not isinstance(states, FakeTensor) or weight is None or weight.dtype != states.dtype:
            return plain(states, shape, weight, eps)
        if states.device != weight.device:
            devices = f"{states.device} and {weight.device}"
            raise DeviceFault(f"rms_norm of tensors on {devices}, at {places.here().line}")
        return _FusedNorm.apply(states, weight)

    return rms_norm


def swiglu_kernels(module: Any) -> dict[str, Callable[..., Any]]:
    """Return mcore's functions of SwiGLU, which torch.compile makes one kernel each, as one for fake tensors.

    module: mcore's `fused_bias_swiglu`. Name -> function that reads and writes what the kernel does; where a router
    weights the tokens, their weights are left out.
    """

    def swiglu(states: Tensor) -> Tensor:
        return torch.ops.aten.mul.Tensor(*states.chunk(2, -1))

    def swiglu_back(upstream: Tensor, states: Tensor) -> Tensor:
        return torch.ops.aten.slice_scatter.default(states, upstream, -1, 0, upstream.shape[-1])

    def weighted_swiglu(states: Tensor, weights: Tensor) -> Tensor:
        return swiglu(states)

    def weighted_swiglu_back(upstream: Tensor, states: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return swiglu_back(upstream, states), torch.empty_like(weights)

    def chosen(fused: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *tensors: (fused if isinstance(tensors[0], FakeTensor) else plain)(*tensors)

    kernels = (swiglu, swiglu_back, weighted_swiglu, weighted_swiglu_back)
    return {each.__name__: chosen(each, getattr(module, each.__name__)) for each in kernels}
