"""The layer specs: `local`, mcore's layers with our norm, on CPU and GPU alike; `te`, Transformer Engine's, which have
the norms inside their linear layers. Both have our core attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import RecipeError
from ..parallel import ContextShard
from .kv_cache import KVCache

__all__ = ["CoreAttention", "Norm", "Spec", "block_spec", "check_spec", "reads_past"]

Spec = Literal["local", "te"]
"""Whose layers a model is made of; its parameters and what it computes are the same."""


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
    """Causal attention by torch's scaled_dot_product_attention: flash on a GPU, and works on a CPU.

    A token attends to itself and those before it; with mcore's `window_size` to so many of them.
    """

    def __init__(self, config: Any, **_: Any) -> None:
        super().__init__()
        self.window: int | None = config.window_size[0] + 1 if config.window_size else None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | KVCache | None, **_: Any
    ) -> Tensor:
        """query: [s, b, heads, head_dim]; key, value: [s, b, kv_groups, head_dim]. Returns [s, b, heads * head_dim].

        attention_mask: no mask, but the number of each token's document, [b, s] on the host, or None: all are one. A
        call a document: as fast as flash attention is over so many, and nothing between documents is computed. Or what
        came before these tokens; or the ticket of a ContextShard, int64 []: then keys and values of the rest are
        fetched.
        """
        span = (
            ContextShard.of(attention_mask)
            if isinstance(attention_mask, Tensor) and attention_mask.dim() == 0
            else None
        )
        if span:
            key, value = span.whole(torch.cat([key, value], -1)).chunk(2, -1)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        if attention_mask is None:
            out = _causal(self.window, q, k, v)
        elif isinstance(attention_mask, KVCache):
            k, v, seen = attention_mask.extend(self, k, v, self.window)
            out = _causal(self.window, q, k, v) if seen is None else _attend(q, k, v, seen)
        elif span:
            out = _shared(self.window, q, k, v, span)
        else:
            samples = zip(*(x.split(1) for x in (q, k, v)), attention_mask, strict=True)
            out = torch.cat([_apart(self.window, *sample) for sample in samples])
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """seen: bool [batch, 1, queries, keys], or a bias; None: what is not after a query, of as many keys."""
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None, enable_gqa=grouped)


def _causal(window: int | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of queries that are the last of the keys, within a window: [batch, heads, queries, head_dim]."""
    mine, every = q.shape[2], k.shape[2]
    if window and every > window:
        seen = torch.ones(mine, every, dtype=torch.bool, device=q.device)
        return _attend(q, k, v, seen.tril(every - mine).triu(every - mine - window + 1))
    if mine == every:
        return _attend(q, k, v, None)
    if q.is_cuda:  # flash attention knows such queries
        from torch.nn.attention.bias import causal_lower_right  # a second of imports, torch's compiler with it

        return _attend(q, k, v, causal_lower_right(mine, every))
    return _attend(q, k, v, torch.ones(mine, every, dtype=torch.bool).tril(every - mine))


def _apart(window: int | None, q: Tensor, k: Tensor, v: Tensor, documents: Tensor) -> Tensor:
    """Causal attention of one sample in each of its documents: [1, heads, s, head_dim]."""
    lengths = documents.unique_consecutive(return_counts=True)[1].tolist()
    parts = zip(*(x.split(lengths, dim=2) for x in (q, k, v)), strict=True)
    return torch.cat([_causal(window, *part) for part in parts], dim=2)


def _shared(window: int | None, q: Tensor, k: Tensor, v: Tensor, span: ContextShard) -> Tensor:
    """Causal attention of a part's queries, each piece to what is not after it: [batch, heads, part, head_dim]."""
    samples = zip(*(x.chunk(len(span.pieces)) for x in (q, k, v)), span.pieces, strict=True)
    return torch.cat([_by_piece(window, *sample) for sample in samples])


def _by_piece(window: int | None, q: Tensor, k: Tensor, v: Tensor, pieces: Sequence[tuple[int, int, int]]) -> Tensor:
    queries = q.split([end - start for start, end, _ in pieces], dim=2)
    keys = [slice(first, end) for _, end, first in pieces]
    return torch.cat(
        [_causal(window, mine, k[:, :, at], v[:, :, at]) for mine, at in zip(queries, keys, strict=True)], dim=2
    )


def reads_past(chunk: Any) -> bool:
    """Whether a GPTModel's attention is ours, which alone knows `KVCache`."""
    return all(isinstance(layer.self_attention.core_attention, CoreAttention) for layer in chunk.decoder.layers)


def block_spec(
    normalization: str, layers: int, *, qk_norm: bool = False, experts: int = 0, spec: Spec = "local"
) -> Any:
    """mcore's TransformerBlockSubmodules for a stage of `layers` layers.

    Raises RecipeError where Transformer Engine is wanted and not there.
    """
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    check_spec(spec)
    layer, norm = _te_layer(qk_norm, experts) if spec == "te" else _local_layer(normalization, qk_norm, experts)
    layer.submodules.self_attention.submodules.core_attention = CoreAttention
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=norm)


def check_spec(spec: Spec) -> None:
    """Raises RecipeError where Transformer Engine is wanted and cannot be imported."""
    if spec == "te" and not _has_te():
        raise RecipeError(
            "spec te needs Transformer Engine, which cannot be imported here. Use one of NVIDIA's PyTorch images, "
            "install minitron-megatron[te] beside CUDA, or set spec to local."
        )


def _has_te() -> bool:
    from megatron.core.extensions.transformer_engine import HAVE_TE

    return bool(HAVE_TE)


def _local_layer(normalization: str, qk_norm: bool, experts: int) -> tuple[Any, Any]:
    """(spec of a layer, the final norm)."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    layer = get_gpt_layer_local_spec(experts or None, normalization=normalization, qk_layernorm=qk_norm)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = Norm
    if qk_norm:
        attention = layer.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = Norm
    return layer, Norm


def _te_layer(qk_norm: bool, experts: int) -> tuple[Any, Any]:
    """(spec of a layer, the final norm). An expert is a module of its own, so that it can be scored."""
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    return get_gpt_layer_with_transformer_engine_spec(experts or None, qk_layernorm=qk_norm), TENorm
