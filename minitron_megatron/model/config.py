"""Model configuration beyond the shape, and its translation to and from Megatron-Core's TransformerConfig."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ModelError, TopologyError
from ..layout import Shape
from ..parallel import Topology
from .spec import Spec

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = ["ModelConfig", "Recompute", "check_fits", "config_of", "rotary_frequencies", "transformer_config"]

Recompute = Literal["none", "selective", "full"]
"""Activation recomputation in the backward pass: none, each layer's MLP or MoE, or each whole layer."""


def squared_relu(x: Tensor) -> Tensor:
    """Return relu(x) ** 2, Nemotron-4's activation function."""
    return F.relu(x).square()


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "relu2": squared_relu}


@dataclass(frozen=True)
class ModelConfig:
    """Configuration of a decoder-only transformer: its shape and its other constants."""

    shape: Shape
    norm: str = "RMSNorm"
    """`RMSNorm`, or `LayerNorm` with a bias."""
    norm_eps: float = 1e-5
    zero_centered_norm: bool = False
    """Whether the stored norm weight is gamma - 1 (Nemotron's LayerNorm1p)."""
    router_pre_softmax: bool = False
    """Whether the router's softmax is over all experts (before top-k); otherwise over the selected ones."""
    activation: str = "silu"
    """`silu`, or `relu2`: squared ReLU."""
    rotary_base: float = 10000.0
    rotary_share: float = 1.0
    """Fraction of each head's channels that are rotated."""
    rotary_scaling: Mapping[str, Any] | None = None
    """Hugging Face's `rope_scaling`: `rope_type` (`linear` or `llama3`) and its factors; None: no scaling."""
    max_positions: int = 2048
    window: int | None = None
    """Sliding window: number of tokens that a token attends to, including itself; None: all tokens before it."""
    init_std: float = 0.02
    source: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Hugging Face config from which this was read; the export starts from it."""

    def __post_init__(self) -> None:
        """Raise ModelError where the constants do not describe a valid model."""
        constants = {name: getattr(self, name) for name in ("norm_eps", "rotary_base", "rotary_share", "init_std")}
        scaling = {key: value for key, value in (self.rotary_scaling or {}).items() if key not in ("rope_type", "type")}
        for name, value in {**constants, **scaling}.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (value == 0 and name != "init_std"):
                raise ModelError(f"{name} of a model is {value!r}, which is not a finite number above 0.")
        if self.rotary_share > 1:
            raise ModelError(f"rotary_share of a model is {self.rotary_share}. It must be at most 1.")
        for name in ("max_positions", "window"):
            value = getattr(self, name)
            if not (name == "window" and value is None) and (type(value) is not int or value < 1):
                raise ModelError(f"{name} of a model is {value!r}, which is not a whole number above 0.")
        if self.norm not in ("RMSNorm", "LayerNorm") or self.activation not in ACTIVATIONS:
            raise ModelError(f"norm {self.norm!r} or activation {self.activation!r} of a model is not known.")

    @property
    def longest(self) -> int:
        """Longest sequence in tokens: the smaller one of `max_positions` and `window`."""
        return min(self.max_positions, self.window or self.max_positions)

    def resized(self, **sizes: int) -> ModelConfig:
        """Return the same configuration with other sizes on some public axes."""
        return replace(self, shape=self.shape.resized(**sizes))


def check_fits(shape: Shape, topology: Topology) -> None:
    """Raise TopologyError where a shape cannot be split over a layout; the message names the sizes of tp that fit."""
    topology.stages(shape.layers)
    _check_experts(shape, topology)
    sizes = {axis: shape.axis_size(axis) for axis in ("kv_groups", "ffn", "shared_ffn")} | {"vocab": shape.padded_vocab}
    for axis, size in sizes.items():
        if size % topology.tp:
            fits = [str(tp) for tp in range(1, 9) if all(each % tp == 0 for each in sizes.values())]
            raise TopologyError(
                f"axis {axis} has {size} units, which cannot be split over TP={topology.tp}. "
                f"Run with TP {' or '.join(fits)}, or choose a multiple of {topology.tp}."
            )


def _check_experts(shape: Shape, topology: Topology) -> None:
    if topology.ep > 1 and not shape.experts:
        raise TopologyError(f"ep={topology.ep} spreads experts, and the model has none. Set ep to 1.")
    if shape.experts % topology.ep:
        fits = " or ".join(str(ep) for ep in range(1, topology.ep) if shape.experts % ep == 0)
        raise TopologyError(
            f"axis experts has {shape.experts} units, which cannot be split over EP={topology.ep}. "
            f"Run with EP {fits}, or choose a multiple of {topology.ep}."
        )
    if shape.experts and topology.tp > 1 and not topology.sequence_parallel:
        raise TopologyError("experts at tp of 2 or more need sequence parallelism. Set sequence_parallel to true.")


def transformer_config(
    config: ModelConfig,
    topology: Topology,
    dtype: torch.dtype = torch.float32,
    *,
    recompute: Recompute = "none",
    spec: Spec = "local",
) -> TransformerConfig:
    """Return mcore's config for this model at this layout, with parameters of `dtype`.

    Raises TopologyError where the shape does not fit the layout.
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    shape = config.shape
    check_fits(shape, topology)
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn or shape.expert_ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_groups,
        kv_channels=shape.head_dim,
        gated_linear_unit=shape.gated,
        activation_func=ACTIVATIONS[config.activation],
        normalization=config.norm,
        layernorm_epsilon=config.norm_eps,
        layernorm_zero_centered_gamma=config.zero_centered_norm,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        **_mixture(config, topology),
        window_size=(config.window - 1, 0) if config.window else None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=topology.tp,
        pipeline_model_parallel_size=topology.pp,
        virtual_pipeline_model_parallel_size=topology.vp if topology.vp > 1 else None,
        pipeline_model_parallel_layout=pipeline_layout(shape.layers, topology),
        sequence_parallel=topology.sequence_parallel,
        # interleaved over two stages, both neighbours are the same rank, and batched sends arrive in the wrong order
        overlap_p2p_comm=topology.vp > 1,
        batch_p2p_comm=topology.vp == 1,
        calculate_per_token_loss=True,
        use_cpu_initialization=spec == "local",  # passes no device, so that torch.device("meta") applies
        init_model_with_meta_device=spec == "te",  # TE's modules pass a device; only this key selects `meta`
        perform_initialization=True,  # costs nothing on `meta`; sets the tensor-parallel attributes of parameters
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        **_recomputed(recompute, shape),
    )


def _recomputed(recompute: Recompute, shape: Shape) -> dict[str, Any]:
    """Return mcore's recomputation keys.

    mcore's own `selective` recomputes the core attention, for which flash attention stores little anyway; ours
    recomputes the MLP or MoE.
    """
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["moe" if shape.experts else "mlp"]}
    return {}


def _mixture(config: ModelConfig, topology: Topology) -> dict[str, Any]:
    """Return mcore's MoE keys: no auxiliary loss, no token dropping."""
    shape = config.shape
    if not shape.experts:
        return {}
    return {
        "num_moe_experts": shape.experts,
        "moe_router_topk": shape.experts_per_token,
        "moe_ffn_hidden_size": shape.expert_ffn,
        "moe_shared_expert_intermediate_size": shape.shared_ffn or None,
        "moe_shared_expert_gate": shape.shared_gate,
        "moe_router_pre_softmax": config.router_pre_softmax,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall" if topology.device.type == "cuda" else "allgather",  # CUDA streams
        "expert_model_parallel_size": topology.ep,
        "expert_tensor_parallel_size": 1,
    }


def pipeline_layout(layers: int, topology: Topology) -> list[list[str]] | None:
    """Return mcore's explicit layer placement, with which any number of layers fits any number of stages; None for one
    stage."""
    if topology.pp == 1:
        return None
    stages = [["decoder"] * len(stage) for stage in topology.stages(layers)]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


def rotary_frequencies(config: ModelConfig) -> Tensor:
    """Return the rotary embedding's frequencies in radians per position: fp32 [rotated channels of a head / 2].

    Computed here because mcore 0.16 hard-codes Llama 3's low, high and original-length constants. Source: Llama 3.1
    reference code, as in transformers' `_compute_llama3_parameters`.
    """
    rotated = int(config.shape.head_dim * config.rotary_share)
    half = torch.arange(0, rotated, 2, dtype=torch.int64).float() / rotated
    frequencies = 1.0 / (config.rotary_base**half)
    scaling = dict(config.rotary_scaling or {})
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "linear":
        return frequencies / scaling["factor"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        share = ((turns - low) / (high - low)).clamp(0, 1)
        return (1 - share) * frequencies / scaling["factor"] + share * frequencies
    return frequencies


def config_of(model: Any) -> ModelConfig:
    """Return the config of an mcore GPTModel: the attribute `minitron` of models built here, else derived from mcore's
    config."""
    ours = getattr(model, "minitron", None)
    if ours is not None:
        return ours
    mcore = model.config
    shape = Shape(
        layers=mcore.num_layers,
        hidden=mcore.hidden_size,
        ffn=0 if mcore.num_moe_experts else mcore.ffn_hidden_size,
        heads=mcore.num_attention_heads,
        kv_groups=mcore.num_query_groups or mcore.num_attention_heads,
        head_dim=mcore.kv_channels,
        vocab=model.vocab_size,
        tied=model.share_embeddings_and_output_weights,
        gated=mcore.gated_linear_unit,
        norm_bias=mcore.normalization == "LayerNorm",
        qkv_bias=mcore.add_qkv_bias,
        qk_norm=mcore.qk_layernorm,
        **_experts(mcore),
    )
    return ModelConfig(
        shape=shape,
        norm=mcore.normalization,
        norm_eps=mcore.layernorm_epsilon,
        zero_centered_norm=mcore.layernorm_zero_centered_gamma,
        rotary_share=getattr(model, "rotary_percent", 1.0),
        rotary_base=getattr(model, "rotary_base", 10000.0),
        max_positions=model.max_sequence_length,
    )


def _experts(mcore: Any) -> dict[str, Any]:
    """Return the expert fields of a shape."""
    if not mcore.num_moe_experts:
        return {}
    return {
        "experts": mcore.num_moe_experts,
        "experts_per_token": mcore.moe_router_topk,
        "expert_ffn": mcore.moe_ffn_hidden_size,
        "shared_ffn": mcore.moe_shared_expert_intermediate_size or 0,
        "shared_gate": mcore.moe_shared_expert_gate,
    }
