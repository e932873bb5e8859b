"""The one table of Megatron-Core's names for the fields of a model's configuration, read in both directions.

`transformer_settings` and `gpt_arguments` give mcore's settings of a ModelConfig; `from_megatron` gives fields of the
ModelConfig back. Megatron-LM's checkpoint arguments and the comparison with Megatron-Bridge use the same table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from typing import Any

from ..layout import Shape
from .chunk import Chunk
from .config import ACTIVATIONS, ModelConfig, activation_name

__all__ = [
    "FACTOR",
    "LLAMA3",
    "SHAPE_NAMES",
    "field_of",
    "from_megatron",
    "gpt_arguments",
    "is_execution_setting",
    "is_unused",
    "rotary_settings",
    "shape_of",
    "shape_settings",
    "transformer_settings",
]

Names = Mapping[str, str]
"""mcore's name -> the field of `Shape` or `ModelConfig`."""

SHAPE: Names = {
    "num_layers": "layers",
    "hidden_size": "hidden",
    "ffn_hidden_size": "ffn",
    "num_attention_heads": "heads",
    "num_query_groups": "kv_groups",
    "kv_channels": "head_dim",
    "gated_linear_unit": "gated",
    "add_qkv_bias": "qkv_bias",
    "qk_layernorm": "qk_norm",
}
EXPERTS: Names = {
    "num_moe_experts": "experts",
    "moe_router_topk": "experts_per_token",
    "moe_ffn_hidden_size": "expert_ffn",
    "moe_shared_expert_intermediate_size": "shared_ffn",
    "moe_shared_expert_gate": "shared_gate",
}
SHAPE_NAMES: Names = {**SHAPE, **EXPERTS}
FUNCTIONS: Names = {
    "normalization": "norm",
    "layernorm_epsilon": "norm_eps",
    "layernorm_zero_centered_gamma": "zero_centered_norm",
    "activation_func": "activation",
    "window_size": "window",
    "moe_router_pre_softmax": "router_pre_softmax",
    "init_method_std": "init_std",
}
ARGUMENTS: Names = {
    "vocab_size": "vocab",
    "share_embeddings_and_output_weights": "tied",
    "max_sequence_length": "max_positions",
    "rotary_percent": "rotary_share",
    "rotary_base": "rotary_base",
}
"""SHAPE_NAMES and FUNCTIONS are settings of a TransformerConfig; ARGUMENTS are arguments, and attributes, of a
GPTModel."""

ALL: Names = {**SHAPE_NAMES, **FUNCTIONS, **ARGUMENTS}

FIXED = {"add_bias_linear": False}
POSITIONS = {"position_embedding_type": "rope"}
"""The only supported value of settings that have another default in mcore."""

Conversion = Callable[[Any], object]

CONVERTED: Mapping[str, tuple[Conversion, Conversion]] = {
    "activation_func": (ACTIVATIONS.__getitem__, activation_name),
    "window_size": (
        lambda tokens: (tokens - 1, 0) if tokens else None,  # mcore does not count the token itself
        lambda sides: sides[0] + 1 if sides else None,
    ),
    "num_moe_experts": (lambda number: number or None, lambda number: number or 0),
    "moe_shared_expert_intermediate_size": (lambda size: size or None, lambda size: size or 0),
}
"""mcore's name -> functions from our value to mcore's, and back. All other values are the same."""

LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Constants that mcore's rotary embedding hard-codes (`RotaryEmbedding._apply_scaling`)."""
FACTOR = 8.0
"""mcore's default of `rope_scaling_factor`."""

EXECUTION = (
    r".*_fusion|fused_.*|use_fused_.*|.*_op_fuser|.*_dtype|.*fp8(?!.*param).*|fp4(?!.*param).*|.*_bf16|.*_dropout|"
    r".*init_method.*|.*_initialization|init_model_with_meta_device|recompute_.*|moe_layer_recompute|"
    r"distribute_saved_activations|.*offload.*|(.*_)?cuda_graph.*|(use_|.*_)?inference_.*|flash_decode|"
    r"batch_invariant_mode|symmetric_ar_type|mlp_chunks_.*|nccl_all_reduce_for_prefill|use_te_.*|transformer_impl|"
    r"attention_backend|flash_attention_version|attention_softmax_in_fp32|apply_query_key_layer_scaling|"
    r"fp32_residual_connection|persist_layer_norm|memory_efficient_layer_norm|clone_scatter_.*|disable_.*|"
    r"config_logger_dir|log_max_attention_logit|calculate_per_token_loss|mtp_loss_.*|cp_comm_type|high_priority_.*|"
    r"pipeline_model_parallel_layout|num_layers_in_(first|last)_pipeline_stage|account_for_.*|test_mode|tp_only_.*|"
    r"moe_(grouped_gemm|shared_expert_overlap|permute_.*|token_dispatcher_type|flex_.*|enable_deepep|deepep_.*|"
    r"hybridep_.*|ncclep_.*|per_layer_logging|paged_.*|extended_tp|aux_loss_coeff|z_loss_coeff|router_padding_.*)"
)
"""Settings that change how a model is computed or trained, and not what it computes. All settings of mcore's
ModelParallelConfig are such, too."""


def _to_megatron(names: Names, ours: object) -> dict[str, object]:
    return {name: CONVERTED.get(name, (_same, _same))[0](getattr(ours, field)) for name, field in names.items()}


def from_megatron(names: Names, mcore: object) -> dict[str, Any]:
    """Return our fields from the attributes of a TransformerConfig or a GPTModel."""
    return {field: CONVERTED.get(name, (_same, _same))[1](getattr(mcore, name)) for name, field in names.items()}


def _same(value: object) -> object:
    return value


# ---- to mcore


def shape_settings(shape: Shape) -> dict[str, object]:
    """Return the settings of mcore's TransformerConfig that fix the shapes of parameters."""
    sizes = _to_megatron(SHAPE_NAMES if shape.experts else SHAPE, shape)
    return sizes | {"ffn_hidden_size": shape.ffn or shape.expert_ffn}


def transformer_settings(config: ModelConfig) -> dict[str, object]:
    """Return the settings of mcore's TransformerConfig that fix what a model computes, and its initial weights."""
    functions = {name: value for name, value in _to_megatron(FUNCTIONS, config).items() if not is_unused(name, config)}
    return shape_settings(config.shape) | functions | FIXED


def gpt_arguments(config: ModelConfig) -> dict[str, object]:
    """Return the arguments of mcore's GPTModel, without its rotary scaling: see `rotary_settings`."""
    ours = {**vars(config.shape), **vars(config)}
    return {name: ours[field] for name, field in ARGUMENTS.items()} | POSITIONS


def rotary_settings(config: ModelConfig) -> dict[str, object]:
    """Return the arguments of mcore's GPTModel for rotary scaling. mcore hard-codes the constants LLAMA3."""
    scaling = config.rotary_scaling or {}
    if scaling.get("rope_type") == "llama3":
        return {"rope_scaling": True, "rope_scaling_factor": scaling["factor"], "seq_len_interpolation_factor": None}
    return {"rope_scaling": False, "seq_len_interpolation_factor": scaling.get("factor")}


# ---- from mcore


def field_of(model: Chunk, field: str) -> Any:
    """Return one field of a GPTModel's Shape or ModelConfig; the model's other settings need not be supported."""
    ours = getattr(model, "minitron", None)
    if ours is not None:
        return getattr(ours, field) if hasattr(ours, field) else getattr(ours.shape, field)
    [name] = [name for name, known in ALL.items() if known == field]
    return from_megatron({name: field}, model if name in ARGUMENTS else model.config)[field]


def shape_of(model: Chunk) -> Shape:
    """Return the shape of a GPTModel; what the model computes with it need not be supported."""
    ours = getattr(model, "minitron", None)
    if ours is not None:
        shape: Shape = ours.shape
        return shape
    mcore = model.config
    sizes = from_megatron(SHAPE_NAMES if mcore.num_moe_experts else SHAPE, mcore)
    return Shape(
        **sizes | ({"ffn": 0} if mcore.num_moe_experts else {}),
        norm_bias=mcore.normalization == "LayerNorm",
        vocab=field_of(model, "vocab"),
        tied=field_of(model, "tied"),
    )


def is_execution_setting(name: str) -> bool:
    """Return whether a setting changes how a model is computed or trained, and not what it computes."""
    return name in _parallel_settings() or re.fullmatch(EXECUTION, name) is not None


@cache
def _parallel_settings() -> frozenset[str]:
    from megatron.core.model_parallel_config import ModelParallelConfig

    return frozenset(field.name for field in fields(ModelParallelConfig))


def is_unused(name: str, config: ModelConfig) -> bool:
    """Return whether mcore does not use a setting: that of experts in a dense model, or the width of dense layers."""
    return name == "ffn_hidden_size" if config.shape.experts else name.startswith("moe_")
