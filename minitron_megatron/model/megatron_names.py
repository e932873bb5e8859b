"""The one table of Megatron-Core's names for the fields of a model's configuration, read in both directions.

`transformer_settings` and `gpt_arguments` give mcore's settings for a ModelConfig; `config_of` gives the ModelConfig of
any GPTModel. A setting that changes what a model computes and that a ModelConfig cannot express is an error that names
it. Megatron-LM's checkpoint arguments and the comparison with Megatron-Bridge use the same table.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..layout import Shape, layer_of, pattern_of
from .config import ACTIVATIONS, ModelConfig, activation_name, rotary_frequencies
from .shards import named_shards

__all__ = [
    "FACTOR",
    "LLAMA3",
    "SHAPE_NAMES",
    "changed_settings",
    "config_of",
    "field_of",
    "gpt_arguments",
    "is_execution_setting",
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

CONVERTED: Mapping[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
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
BALANCING, LOSSES = "moe_router_load_balancing_type", {"none", "aux_loss", "seq_aux_loss", "global_aux_loss"}


def _to_megatron(names: Names, ours: Any) -> dict[str, Any]:
    return {name: CONVERTED.get(name, (_same, _same))[0](getattr(ours, field)) for name, field in names.items()}


def _from_megatron(names: Names, mcore: Any) -> dict[str, Any]:
    return {field: CONVERTED.get(name, (_same, _same))[1](getattr(mcore, name)) for name, field in names.items()}


def _same(value: Any) -> Any:
    return value


# ---- to mcore


def shape_settings(shape: Shape) -> dict[str, Any]:
    """Return the settings of mcore's TransformerConfig that fix the shapes of parameters."""
    sizes = _to_megatron(SHAPE_NAMES if shape.experts else SHAPE, shape)
    return sizes | {"ffn_hidden_size": shape.ffn or shape.expert_ffn}


def transformer_settings(config: ModelConfig) -> dict[str, Any]:
    """Return the settings of mcore's TransformerConfig that fix what a model computes, and its initial weights."""
    functions = {name: value for name, value in _to_megatron(FUNCTIONS, config).items() if not _unused(name, config)}
    return shape_settings(config.shape) | functions | FIXED


def gpt_arguments(config: ModelConfig) -> dict[str, Any]:
    """Return the arguments of mcore's GPTModel, without its rotary scaling: see `rotary_settings`."""
    ours = {**vars(config.shape), **vars(config)}
    return {name: ours[field] for name, field in ARGUMENTS.items()} | POSITIONS


def rotary_settings(config: ModelConfig) -> dict[str, Any]:
    """Return the arguments of mcore's GPTModel for rotary scaling. mcore hard-codes the constants LLAMA3."""
    scaling = config.rotary_scaling or {}
    if scaling.get("rope_type") == "llama3":
        return {"rope_scaling": True, "rope_scaling_factor": scaling["factor"], "seq_len_interpolation_factor": None}
    return {"rope_scaling": False, "seq_len_interpolation_factor": scaling.get("factor")}


# ---- from mcore


def field_of(model: Any, field: str) -> Any:
    """Return one field of a GPTModel's Shape or ModelConfig; the model's other settings need not be supported."""
    ours = getattr(model, "minitron", None)
    if ours is not None:
        return getattr(ours, field) if hasattr(ours, field) else getattr(ours.shape, field)
    [name] = [name for name, known in ALL.items() if known == field]
    return _from_megatron({name: field}, model if name in ARGUMENTS else model.config)[field]


def shape_of(model: Any) -> Shape:
    """Return the shape of a GPTModel; what the model computes with it need not be supported."""
    ours = getattr(model, "minitron", None)
    if ours is not None:
        shape: Shape = ours.shape
        return shape
    mcore = model.config
    sizes = _from_megatron(SHAPE_NAMES if mcore.num_moe_experts else SHAPE, mcore)
    return Shape(
        **sizes | ({"ffn": 0} if mcore.num_moe_experts else {}),
        norm_bias=mcore.normalization == "LayerNorm",
        vocab=field_of(model, "vocab"),
        tied=field_of(model, "tied"),
    )


def config_of(model: Any) -> ModelConfig:
    """Return the config of a GPTModel: the attribute `minitron` of models built here, else read from mcore's settings.

    Raises ModelError, which names the setting, where a ModelConfig cannot express what the model computes.
    """
    ours: ModelConfig | None = getattr(model, "minitron", None)
    if ours is not None:
        return ours
    positions = getattr(model, "position_embedding_type", None)
    if positions != POSITIONS["position_embedding_type"]:
        raise _inexpressible("position_embedding_type", positions, "'rope'")
    if model.mtp_process:
        raise _inexpressible("mtp_block_spec", "a block", None)
    shape = shape_of(model)
    functions = FUNCTIONS if shape.experts else {name: FUNCTIONS[name] for name in FUNCTIONS if name[:4] != "moe_"}
    config = ModelConfig(
        shape=shape,
        max_positions=field_of(model, "max_positions"),
        rotary_share=field_of(model, "rotary_share"),
        rotary_base=field_of(model, "rotary_base"),
        **_from_megatron(functions, model.config),
    )
    reference = _reference(config)
    settings = {name: getattr(model.config, name) for name in reference}
    for name, found, wanted in changed_settings(settings, reference, config):
        raise _inexpressible(name, found, repr(wanted))
    _check_parameters(model, shape)
    return replace(config, rotary_scaling=_rotary_scaling(model.rotary_pos_emb, config))


def changed_settings(
    found: Mapping[str, Any], wanted: Mapping[str, Any], config: ModelConfig
) -> Iterator[tuple[str, Any, Any]]:
    """Yield (name, value found, value wanted) of each setting by which two models compute different things.

    wanted: all settings of the model of `config`, with mcore's defaults.
    """
    for name, value in wanted.items():
        if is_execution_setting(name) or name == "activation_func" or _unused(name, config):
            continue  # `activation_name` compares activations by their values
        if found[name] != value and not (name == BALANCING and _balances_by_loss(found[name])):
            yield name, found[name], value


def _balances_by_loss(kinds: str | Sequence[str]) -> bool:
    """Return whether the load of experts is balanced by losses only, or not at all: the routing does not change."""
    return {kinds} <= LOSSES if isinstance(kinds, str) else set(kinds) <= LOSSES


def is_execution_setting(name: str) -> bool:
    """Return whether a setting changes how a model is computed or trained, and not what it computes."""
    return name in _parallel_settings() or re.fullmatch(EXECUTION, name) is not None


@cache
def _parallel_settings() -> frozenset[str]:
    from megatron.core.model_parallel_config import ModelParallelConfig

    return frozenset(field.name for field in fields(ModelParallelConfig))


def _unused(name: str, config: ModelConfig) -> bool:
    """Return whether mcore does not use a setting: that of experts in a dense model, or the width of dense layers."""
    return name == "ffn_hidden_size" if config.shape.experts else name.startswith("moe_")


def _reference(config: ModelConfig) -> dict[str, Any]:
    """Return all settings of the TransformerConfig that has mcore's defaults beside those of `config`."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    reference = TransformerConfig(**transformer_settings(config))
    return {field.name: getattr(reference, field.name) for field in fields(TransformerConfig)}


def _check_parameters(model: Any, shape: Shape) -> None:
    """Raise ModelError where layers have other parameters than the settings say: layer specs can add modules."""
    found = {pattern_of(shard.name) for shard in named_shards(model)}
    known = {pattern_of(name) for name in shape.names()}
    expected = {pattern for pattern in known if layer_of(pattern.replace("*", "0")) is not None}
    if other := sorted(found - known | (expected - found if len(model.decoder.layers) else set())):
        raise ModelError(
            f"the model's layer spec and its settings do not agree on {', '.join(other)}. "
            "Build it from a spec that fits its TransformerConfig."
        )


def _rotary_scaling(rotary: Any, config: ModelConfig) -> dict[str, Any] | None:
    """Return the rotary scaling whose frequencies a GPTModel uses. config: without scaling."""
    found = rotary.inv_freq.cpu() / (rotary.seq_len_interpolation_factor or 1)
    for scaling in (None, *_scalings(found, config)):
        frequencies = rotary_frequencies(replace(config, rotary_scaling=scaling))
        if frequencies.shape == found.shape and torch.allclose(frequencies, found, rtol=1e-5, atol=0):
            return scaling
    raise ModelError(
        "the model's rotary frequencies (rotary_pos_emb.inv_freq) are not those of its rotary_base and rotary_percent "
        "with rope_scaling or seq_len_interpolation_factor. Use one of these."
    )


def _scalings(found: Tensor, config: ModelConfig) -> Iterator[dict[str, Any]]:
    """Yield a linear and a llama3 scaling, each with the factor by which the lowest frequency becomes the one found."""
    plain = rotary_frequencies(config)[-1]
    yield {"rope_type": "linear", "factor": _rounded(plain / found[-1])}
    llama3 = {"rope_type": "llama3", **LLAMA3}
    half = rotary_frequencies(replace(config, rotary_scaling={**llama3, "factor": 2.0}))[-1]
    if half == plain:  # no frequency is low enough to be scaled, by any factor
        return
    inverse = 1 - (plain - found[-1]) / (2 * (plain - half))  # a frequency is linear in 1 / factor
    if inverse > 0:
        yield {**llama3, "factor": _rounded(1 / inverse)}


def _rounded(factor: Tensor) -> float:
    return float(f"{factor.item():.6g}")  # fp32 holds about seven digits


def _inexpressible(name: str, found: object, wanted: str | None) -> ModelError:
    return ModelError(
        f"the model sets {name}={found!r}, which this package cannot express: here it would be {wanted}. "
        "Such a model can be scored, pruned and distilled, but not exported."
    )
