"""A family without a row here, as Megatron-Bridge (0.4 or later, where it is installed) knows it: the names of its
tensors and the functions of its model. What our models do not compute alike is an error, never a guess."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..layout import TABLE, pattern_of
from ..model import ACTIVATIONS, ModelConfig
from .family import WHOLE, Family, Keys, Names
from .keys import SHARE

__all__ = ["bridged", "check_bridged"]

WHOLES = ("AutoMapping", "DirectMapping", "ReplicatedMapping", "ColumnParallelMapping", "RowParallelMapping")
ROLES = ("QKVMapping", "GatedMLPMapping")
"""Its mappings of a tensor that is all of a Megatron one, and of several that are its parts."""

SIZES = {
    "ffn_hidden_size": "ffn",
    "num_moe_experts": "experts",
    "moe_router_topk": "experts_per_token",
    "moe_ffn_hidden_size": "expert_ffn",
}
"""Megatron's key -> the field of `Shape` that a config calls as it likes."""

SHARED_FFN = ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size")
EPSILONS = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layernorm_epsilon")

TAKEN = (
    "gated_linear_unit|activation_func|normalization|layernorm_zero_centered_gamma|add_qkv_bias|qk_layernorm|"
    "moe_shared_expert_gate"
)
"""What a family here takes over from its model."""
FREE = (
    r".*_fusion|.*_dtype|bf16|fp16|.*_dropout|.*init_method.*|.*_initialization|.*_parallel_size|recompute_.*|"
    r"persist_layer_norm|attention_softmax_in_fp32|attention_backend|calculate_per_token_loss|cross_entropy_.*|"
    r"cuda_graph_.*|tp_comm_.*|cp_comm_type|async_tensor_.*|scatter_embedding_.*|deallocate_pipeline_outputs|"
    r"seq_length|make_vocab_size_divisible_by|transformer_layer_spec|moe_grouped_gemm|moe_shared_expert_overlap|"
    r"moe_aux_loss_coeff|moe_router_load_balancing_type|moe_token_dispatcher_type|moe_flex_.*|mtp_loss_.*|"
    r"hf_.*|generation_config|.*_token_id"
)
"""What says how a model is trained or run, and not what it computes; the layers' spec is compared by itself."""

UNSAID: Mapping[str, Callable[[Any], int]] = {
    "num_query_groups": lambda said: said.num_attention_heads,
    "kv_channels": lambda said: said.hidden_size // said.num_attention_heads,
}
"""What mcore takes where they are None."""


@dataclass(frozen=True)
class Known:
    """What Megatron-Bridge has for one config."""

    family: Family
    provider: Any
    """Its `GPTModelProvider`, an mcore `TransformerConfig` and what a GPTModel needs besides."""


def bridged(hf: Mapping[str, Any]) -> Family | None:
    """The family of a Hugging Face config after Megatron-Bridge; None where that is not installed or knows none.

    Raises CheckpointError where its model is none of ours.
    """
    known = _known(json.dumps(hf, sort_keys=True))
    return known.family if known else None


def check_bridged(config: ModelConfig) -> None:
    """Raises CheckpointError where Megatron-Bridge would build another model than this of the same config."""
    known = _known(json.dumps(config.source, sort_keys=True))
    assert known is not None
    expected = _expected(config)
    for name, default in _defaults().items():
        wanted, value = expected.get(name, default), getattr(known.provider, name)
        if value is None and name in UNSAID:
            value = UNSAID[name](known.provider)
        if not re.fullmatch(f"{TAKEN}|{FREE}", name) and value != wanted:
            raise _refusal(config.source, f"{name}={value!r}; here it would be {wanted!r}")
    if missing := {pattern_of(name) for name in config.shape.names()} - set(known.family.names):
        raise _refusal(config.source, f"no names, or no plain ones, for {', '.join(sorted(missing))}")


@cache
def _known(config: str) -> Known | None:
    """config: JSON, for it is asked for each parameter."""
    if importlib.util.find_spec("megatron.bridge") is None:
        return None
    from megatron.bridge import AutoBridge
    from transformers import AutoConfig, PretrainedConfig

    hf = json.loads(config)  # of its auto_map the name of the class alone is read
    try:
        asked = AutoConfig.for_model(**hf)
    except ValueError:  # of a family that transformers does not know
        asked = PretrainedConfig.from_dict(hf)
    try:
        auto = AutoBridge.from_hf_config(asked)
    except ValueError:  # with the whole list of those that it knows
        return None
    try:
        bridge, provider = auto._model_bridge, auto.to_megatron_provider(load_weights=False)
    except Exception as error:  # code of each family's own
        raise _refusal(hf, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
    _refuse_other_code(bridge, provider, hf)
    return Known(_family(bridge, provider, hf), provider)


def _refuse_other_code(bridge: Any, provider: Any, hf: Mapping[str, Any]) -> None:
    """What of a family is code of its own is not said by its settings."""
    from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
    from megatron.bridge.models.gpt_provider import GPTModelProvider

    kind = type(provider)
    if not issubclass(kind, GPTModelProvider):
        raise _refusal(hf, f"a model that is no GPTModel ({kind.__name__})")
    defaults = _defaults()
    names = {field.name for field in fields(kind)} | set(vars(provider))
    if own := sorted(name for name in names - set(defaults) if not re.fullmatch(FREE, name)):
        raise _refusal(hf, f"settings of its own: {', '.join(own)}")
    if kind.provide is not GPTModelProvider.provide:
        raise _refusal(hf, f"a model of its own ({kind.__name__})")
    if provider.transformer_layer_spec is not defaults["transformer_layer_spec"]:
        raise _refusal(hf, "layers of its own")
    if type(bridge).maybe_modify_loaded_hf_weight is not MegatronModelBridge.maybe_modify_loaded_hf_weight:
        raise _refusal(hf, f"weights that {type(bridge).__name__} changes on the way")


def _family(bridge: Any, provider: Any, hf: Mapping[str, Any]) -> Family:
    return Family(
        hf["model_type"],
        hf["architectures"][0],
        _names(bridge),
        shape={
            "gated": provider.gated_linear_unit,
            "qkv_bias": provider.add_qkv_bias,
            "qk_norm": provider.qk_layernorm,
            "norm_bias": provider.normalization == "LayerNorm",
            "shared_gate": provider.moe_shared_expert_gate,
        },
        functions={
            "norm": provider.normalization,
            "zero_centered_norm": provider.layernorm_zero_centered_gamma,
            "activation": _activation(provider.activation_func, hf),
        },
        eps=next((key for key in EPSILONS if key in hf), EPSILONS[0]),
        keys=_keys(bridge, provider, hf),
        read={"partial_rotary_factor": SHARE},
        defaults={"partial_rotary_factor": provider.rotary_percent, "max_position_embeddings": 2048},
        strict=False,
        norm_topk_prob=not provider.moe_router_pre_softmax,
    )


@cache
def _defaults() -> dict[str, Any]:
    from megatron.bridge.models.gpt_provider import GPTModelProvider

    return {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(GPTModelProvider)
    }


def _activation(function: Callable[[Tensor], Tensor], hf: Mapping[str, Any]) -> str:
    """Ours by what they compute: its squared ReLU is another object."""
    x = torch.linspace(-4, 4, 65)
    for name, ours in ACTIVATIONS.items():
        if torch.allclose(function(x), ours(x)):
            return name
    raise _refusal(
        hf, f"activation_func={getattr(function, '__name__', function)}, not one of {', '.join(ACTIVATIONS)}"
    )


def _names(bridge: Any) -> Names:
    """Of those that are parameters here; Transformer Engine's names stand beside the local ones, one by one."""
    names: dict[str, Mapping[str, str]] = {}
    for mapping in bridge.mapping_registry():
        kind = type(mapping).__name__
        if mapping.megatron_param not in TABLE or getattr(mapping, "permute_dims", None):
            continue
        if kind in WHOLES:
            names[mapping.megatron_param] = {WHOLE: mapping.hf_param}
        elif kind in ROLES:
            names[mapping.megatron_param] = dict(mapping.hf_param)
    return names


def _keys(bridge: Any, provider: Any, hf: Mapping[str, Any]) -> Keys:
    mixture = bool(provider.num_moe_experts)
    keys: dict[str, tuple[str, ...]] = {}
    for key, megatron in bridge.CONFIG_MAPPING:
        field = SIZES.get(megatron)
        if field and key in hf and (field != "ffn") == mixture:
            keys[field] = (*keys.get(field, ()), key)
    if provider.moe_shared_expert_intermediate_size:
        keys["shared_ffn"] = tuple(key for key in SHARED_FFN if key in hf) or SHARED_FFN[:1]
    return keys


def _expected(config: ModelConfig) -> dict[str, Any]:
    """Megatron-Bridge's keys, of what our model of a config computes; the rest is as mcore has it by itself."""
    shape, scaling = config.shape, config.rotary_scaling or {}
    llama3 = scaling.get("rope_type") == "llama3"
    expected = {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "num_attention_heads": shape.heads,
        "num_query_groups": shape.kv_groups,
        "kv_channels": shape.head_dim,
        "vocab_size": shape.vocab,
        "share_embeddings_and_output_weights": shape.tied,
        "add_bias_linear": False,
        "layernorm_epsilon": config.norm_eps,
        "position_embedding_type": "rope",
        "rotary_base": config.rotary_base,
        "rotary_percent": config.rotary_share,
        "rope_scaling": llama3,
        "seq_len_interpolation_factor": scaling.get("factor") if not llama3 else None,
    }
    if llama3:
        expected["rope_scaling_factor"] = scaling["factor"]
    if not shape.experts:
        return expected | {"ffn_hidden_size": shape.ffn}
    return expected | {
        "ffn_hidden_size": config.source.get("intermediate_size"),  # of layers without experts: there is none
        "num_moe_experts": shape.experts,
        "moe_router_topk": shape.experts_per_token,
        "moe_ffn_hidden_size": shape.expert_ffn,
        "moe_shared_expert_intermediate_size": shape.shared_ffn or None,
        "moe_router_pre_softmax": config.router_pre_softmax,
    }


def _refusal(hf: Mapping[str, Any], reason: str) -> CheckpointError:
    return CheckpointError(
        f"model_type {hf['model_type']!r} has no row here, and Megatron-Bridge says of it: {reason}. "
        "docs/families.md says what can be a row."
    )
