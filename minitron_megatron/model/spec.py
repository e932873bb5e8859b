"""Layer specs: `local`, mcore's layers with our norm, for CPU and GPU; `te`, Transformer Engine's layers, with norms
fused into linear layers. Both use our core attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RecipeError
from ..parallel import AttentionContext
from .chunk import Chunk

if TYPE_CHECKING:
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = ["CoreAttention", "Norm", "Spec", "block_spec", "check_spec", "reads_past"]

Spec = Literal["local", "te"]
"""Layer implementation; the parameters and the computed function are the same."""
PREFER_CUDNN, CUDNN = ((9, 0), (10, 0)), 91501
"""Compute capabilities of H100, H200 and B200, and the cuDNN from which on torch 2.13 takes its attention there."""


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dim; unlike mcore's torch norm it supports sequence parallelism, and weights
    stored as gamma - 1."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.centred = int(config.layernorm_zero_centered_gamma)
        self.weight = nn.Parameter(torch.full((hidden_size,), 1.0 - self.centred, dtype=config.params_dtype))
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():  # its gradient is summed over tp
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, states: Tensor) -> Tensor:
        weight = self.weight + self.centred if self.centred else self.weight
        if self.bias is None:
            return F.rms_norm(states, weight.shape, weight, self.eps)
        return F.layer_norm(states, weight.shape, weight, self.bias, self.eps)


class CoreAttention(nn.Module):
    """Causal attention with torch's scaled_dot_product_attention: flash attention on a GPU; also works on a CPU.

    A token attends to itself and to the tokens before it, limited by mcore's `window_size` where that is set.
    """

    def __init__(self, config: TransformerConfig, **_: object) -> None:
        super().__init__()
        self.window: int | None = config.window_size[0] + 1 if config.window_size else None

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: object) -> Tensor:
        """Return [s, b, heads * head_dim]. query: [s, b, heads, head_dim]; key, value: [s, b, kv_groups, head_dim].

        attention_mask: the AttentionContext that `final_hidden` passes.
        """
        context = AttentionContext.of(attention_mask)
        if context.shard:  # gather the keys and values of the other ranks
            key, value = context.shard.whole(torch.cat([key, value], -1)).chunk(2, -1)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        with _kernels(q, context):
            out = self._attended(q, k, v, context)
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, context: AttentionContext) -> Tensor:
        if context.cache:
            k, v, mask = context.cache.extend(self, k, v, self.window)
            return _causal(self.window, q, k, v) if mask is None else _masked(q, k, v, mask)
        if context.shard:
            return _context_parallel(self.window, q, k, v, context.pieces)
        if context.documents is None:
            return _causal(self.window, q, k, v)
        samples = zip(*(x.split(1) for x in (q, k, v)), context.documents, strict=True)
        return torch.cat([_by_document(self.window, *sample) for sample in samples])


def _kernels(query: Tensor, context: AttentionContext) -> AbstractContextManager[None]:
    """Choose the kernels of attention on a GPU: cuDNN's first where it takes two thirds of flash attention's time, as
    torch does by itself from 2.13 on; never for shapes that vary, since it makes a plan of some 30 ms for each new one.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    others = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    if not query.is_cuda or not torch.backends.cuda.cudnn_sdp_enabled():
        return nullcontext()
    if context.has_varying_shapes:
        return sdpa_kernel(others)
    if torch.cuda.get_device_capability() in PREFER_CUDNN and (torch.backends.cudnn.version() or 0) >= CUDNN:
        return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, *others], set_priority=True)
    return nullcontext()


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Call SDPA with a mask, bool [batch or 1, 1, queries, keys].

    The query heads of a group become queries of one head: kernels with a mask want as many heads of queries as of keys,
    and would otherwise copy the keys and values for each query head.
    """
    batch, heads, queries, width = q.shape
    groups, times = k.shape[1], heads // k.shape[1]
    repeated = mask[:, :, None].expand(-1, -1, times, -1, -1).reshape(len(mask), 1, times * queries, -1)
    out = F.scaled_dot_product_attention(q.reshape(batch, groups, times * queries, width), k, v, repeated)
    return out.reshape(q.shape)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Call SDPA. mask: a bias for queries at the last keys; None: causal, with as many keys as queries.

    On a GPU, keys and values of fp32 are repeated for each query head: flash attention wants 16 bits, memory-efficient
    attention refuses grouped heads, and the kernel that is left holds all scores, queries x keys a head.
    """
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda and q.dtype == torch.float32:
        k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], 1) for each in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=grouped)


def _causal(window: int | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal attention within a window: [batch, heads, queries, head_dim]. The queries are at the last keys."""
    queries, keys = q.shape[2], k.shape[2]
    if window and keys > window:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
        return _masked(q, k, v, mask.tril(keys - queries).triu(keys - queries - window + 1)[None, None])
    if queries == keys:
        return _attend(q, k, v, None)
    if q.is_cuda:  # flash attention supports this bias
        from torch.nn.attention.bias import causal_lower_right  # imports torch's compiler, which takes a second

        return _attend(q, k, v, causal_lower_right(queries, keys))
    return _masked(q, k, v, torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None])


def _by_document(window: int | None, q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    """Return causal attention of one sample within each of its documents: [1, heads, s, head_dim]."""
    lengths = documents.unique_consecutive(return_counts=True)[1].tolist()
    parts = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    return torch.cat([_causal(window, *part) for part in parts], dim=2)


def _context_parallel(
    window: int | None, q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[Sequence[tuple[int, int, int]]]
) -> Tensor:
    """Return causal attention of this rank's queries to the whole sequence: [batch, heads, part, head_dim]."""
    samples = zip(*(x.chunk(len(pieces)) for x in (q, k, v)), pieces, strict=True)
    return torch.cat([_by_piece(window, *sample) for sample in samples])


def _by_piece(window: int | None, q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[tuple[int, int, int]]) -> Tensor:
    queries = q.split([end - start for start, end, _ in pieces], dim=2)
    keys = [slice(first, end) for _, end, first in pieces]
    return torch.cat(
        [_causal(window, piece, k[:, :, at], v[:, :, at]) for piece, at in zip(queries, keys, strict=True)], dim=2
    )


def reads_past(chunk: Chunk) -> bool:
    """Return whether a GPTModel uses our core attention, which alone supports `KVCache`."""
    return all(isinstance(layer.self_attention.core_attention, CoreAttention) for layer in chunk.decoder.layers)


def block_spec(
    normalization: str, layers: int, *, qk_norm: bool = False, experts: int = 0, spec: Spec = "local"
) -> TransformerBlockSubmodules:
    """Return mcore's TransformerBlockSubmodules for a stage of `layers` layers.

    Raises RecipeError where `spec` is `te` and Transformer Engine cannot be imported.
    """
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    check_spec(spec)
    layer, norm = _te_layer(qk_norm, experts) if spec == "te" else _local_layer(normalization, qk_norm, experts)
    layer.submodules.self_attention.submodules.core_attention = CoreAttention
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)


def check_spec(spec: Spec) -> None:
    """Raise RecipeError where `spec` is `te` and Transformer Engine cannot be imported."""
    if spec == "te" and not _has_te():
        raise RecipeError(
            "spec te needs Transformer Engine, which cannot be imported here. Use one of NVIDIA's PyTorch images, "
            "install minitron-megatron[te] beside CUDA, or set spec to local."
        )


def _has_te() -> bool:
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


def _local_layer(normalization: str, qk_norm: bool, experts: int) -> tuple[ModuleSpec, type[nn.Module]]:
    """Return (layer spec, final norm)."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    layer = get_gpt_layer_local_spec(experts or None, normalization=normalization, qk_layernorm=qk_norm)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    if qk_norm:
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = Norm
    return layer, Norm


def _te_layer(qk_norm: bool, experts: int) -> tuple[ModuleSpec, type[nn.Module]]:
    """Return (layer spec, final norm). Each expert is a separate module, so that it can be scored."""
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    return get_gpt_layer_with_transformer_engine_spec(experts or None, qk_layernorm=qk_norm), TENorm
