"""The `local` layer spec: mcore's layers with our norm and core attention, on CPU and GPU alike."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cache import Past

__all__ = ["CoreAttention", "Norm", "block_spec", "reads_past"]


class Norm(nn.Module):
    """RMSNorm or LayerNorm over the last dim; unlike mcore's torch norm it knows sequence parallelism and gamma - 1."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
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
    """Causal attention by torch's scaled_dot_product_attention: flash on a GPU, and works on a CPU."""

    def __init__(self, config: Any, **_: Any) -> None:
        super().__init__()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | Past | None, **_: Any
    ) -> Tensor:
        """query: [s, b, heads, head_dim]; key, value: [s, b, kv_groups, head_dim]. Returns [s, b, heads * head_dim].

        attention_mask: no mask, but the number of each token's document, [b, s] on the host, or None: all are one. A
        call a document: as fast as flash attention is over so many, and nothing between documents is computed. Or what
        came before these tokens.
        """
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if attention_mask is None:
            out = _causal(q, k, v)
        elif isinstance(attention_mask, Past):
            k, v, seen = attention_mask.extend(self, k, v)
            out = _causal(q, k, v, seen)
        else:
            samples = zip(*(x.split(1) for x in (q, k, v)), attention_mask, strict=True)
            out = torch.cat([_apart(*sample) for sample in samples])
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


def _causal(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
    """seen: bool [batch, 1, queries, keys]; by default what is not after a query."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None, enable_gqa=grouped)


def _apart(q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    """Causal attention of one sample in each of its documents: [1, heads, s, head_dim]."""
    lengths = documents.unique_consecutive(return_counts=True)[1].tolist()
    parts = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    return torch.cat([_causal(*part) for part in parts], dim=2)


def reads_past(chunk: Any) -> bool:
    """Whether a GPTModel's attention is ours, which alone knows `Past`."""
    return all(isinstance(layer.self_attention.core_attention, CoreAttention) for layer in chunk.decoder.layers)


def block_spec(normalization: str, layers: int, *, qk_norm: bool = False, experts: int = 0) -> Any:
    """mcore's TransformerBlockSubmodules for a stage of `layers` layers."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    layer = get_gpt_layer_local_spec(experts or None, normalization=normalization, qk_layernorm=qk_norm)
    attention = layer.submodules.self_attention.submodules
    layer.submodules.input_layernorm = Norm
    layer.submodules.pre_mlp_layernorm = Norm
    attention.core_attention = CoreAttention
    if qk_norm:
        attention.q_layernorm = attention.k_layernorm = Norm
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=Norm)
