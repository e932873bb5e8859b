"""Families without a row in `families.py`, from Megatron-Bridge (0.4 or later) if it is installed.

Megatron-Bridge gives the tensors' names and the model's functions. A family that our models would compute differently
is an error, never a guess.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import TYPE_CHECKING

from torch import Tensor

from ..errors import CheckpointError, ModelError, first_line
from ..layout import TABLE, pattern_of
from ..model import (
    SHAPE_NAMES,
    ModelConfig,
    activation_name,
    changed_settings,
    gpt_arguments,
    is_execution_setting,
    rotary_settings,
    transformer_settings,
)
from .family import WHOLE, Family, Keys, Names
from .keys import SHARE, HfConfig

if TYPE_CHECKING:
    from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
    from megatron.bridge.models.gpt_provider import GPTModelProvider

__all__ = ["bridged", "check_bridged"]

WHOLES = ("AutoMapping", "DirectMapping", "ReplicatedMapping", "ColumnParallelMapping", "RowParallelMapping")
ROLES = ("QKVMapping", "GatedMLPMapping")
"""Megatron-Bridge's mappings of one tensor to a whole parameter (WHOLES), and of several tensors to its parts."""

SIZES = ("ffn", "experts", "experts_per_token", "expert_ffn")
"""Fields of `Shape` whose key in config.json differs between families."""

SHARED_FFN = ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size")
EPSILONS = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layernorm_epsilon")

FREE = (
    r"scatter_embedding_.*|seq_length|make_vocab_size_divisible_by|transformer_layer_spec|hf_.*|"
    r"generation_config|.*_token_id"
)
"""Further provider settings that do not change what a model computes; the layer spec is compared separately."""

UNSET: Mapping[str, Callable[[GPTModelProvider], int]] = {
    "num_query_groups": lambda provider: provider.num_attention_heads,
    "kv_channels": lambda provider: provider.hidden_size // provider.num_attention_heads,
}
"""Values that mcore uses for settings that are None."""


@dataclass(frozen=True)
class Known:
    """Megatron-Bridge's answer for one config."""

    family: Family
    provider: GPTModelProvider
    """Its `GPTModelProvider`: mcore's `TransformerConfig` and the other settings of a GPTModel."""


def bridged(hf: HfConfig) -> Family | None:
    """Return the family of a config according to Megatron-Bridge; None if it is not installed or has no such family.

    Raises CheckpointError if our models cannot compute this family.
    """
    known = _known(json.dumps(hf, sort_keys=True))
    return known.family if known else None


def check_bridged(config: ModelConfig) -> None:
    """Raise CheckpointError if Megatron-Bridge would build a different model from the same config."""
    known = _known(json.dumps(config.source, sort_keys=True))
    assert known is not None
    wanted = _defaults() | transformer_settings(config) | gpt_arguments(config) | rotary_settings(config)
    wanted = {name: value for name, value in wanted.items() if name in _defaults() and not _is_free(name)}
    found = {name: _setting(known.provider, name) for name in wanted}
    for name, value, here in changed_settings(found, wanted, config):
        raise _refusal(config.source, f"it sets {name}={value!r}; here it would be {here!r}")
    if missing := {pattern_of(name) for name in config.shape.names()} - set(known.family.names):
        raise _refusal(config.source, f"it has no plain tensor mapping for {', '.join(sorted(missing))}")


def _setting(provider: GPTModelProvider, name: str) -> object:
    value = getattr(provider, name)
    return UNSET[name](provider) if value is None and name in UNSET else value


@cache
def _known(config: str) -> Known | None:
    """Ask Megatron-Bridge. config: as JSON text, so that the answer can be cached; it is asked for each parameter."""
    if importlib.util.find_spec("megatron.bridge") is None:
        return None
    from megatron.bridge import AutoBridge
    from transformers import AutoConfig, PretrainedConfig

    hf = json.loads(config)  # only the class name in its auto_map is read; no code is loaded
    try:
        hf_config = AutoConfig.for_model(**hf)
    except ValueError:  # transformers does not know this family
        hf_config = PretrainedConfig.from_dict(hf)
    try:
        auto = AutoBridge.from_hf_config(hf_config)
    except ValueError:  # Megatron-Bridge does not know it either
        return None
    try:
        bridge, provider = auto._model_bridge, auto.to_megatron_provider(load_weights=False)
    except Exception as error:  # each family runs its own code, which may raise anything
        raise _refusal(hf, f"{type(error).__name__}: {first_line(error)}") from error
    _refuse_other_code(bridge, provider, hf)
    return Known(_family(bridge, provider, hf), provider)


def _is_free(name: str) -> bool:
    return is_execution_setting(name) or re.fullmatch(FREE, name) is not None


def _refuse_other_code(bridge: MegatronModelBridge, provider: GPTModelProvider, hf: HfConfig) -> None:
    """Raise CheckpointError if the family has code of its own, which its settings would not show."""
    from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
    from megatron.bridge.models.gpt_provider import GPTModelProvider

    kind = type(provider)
    if not issubclass(kind, GPTModelProvider):
        raise _refusal(hf, f"its model is not a GPTModel ({kind.__name__})")
    defaults = _defaults()
    names = {field.name for field in fields(kind)} | set(vars(provider))
    if own := sorted(name for name in names - set(defaults) if not _is_free(name)):
        raise _refusal(hf, f"it has settings of its own: {', '.join(own)}")
    if kind.provide is not GPTModelProvider.provide:
        raise _refusal(hf, f"it builds a model of its own ({kind.__name__})")
    if provider.transformer_layer_spec is not defaults["transformer_layer_spec"]:
        raise _refusal(hf, "it has layers of its own")
    if type(bridge).maybe_modify_loaded_hf_weight is not MegatronModelBridge.maybe_modify_loaded_hf_weight:
        raise _refusal(hf, f"{type(bridge).__name__} changes weights while loading")


def _family(bridge: MegatronModelBridge, provider: GPTModelProvider, hf: HfConfig) -> Family:
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
def _defaults() -> dict[str, object]:
    from megatron.bridge.models.gpt_provider import GPTModelProvider

    return {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(GPTModelProvider)
    }


def _activation(function: Callable[[Tensor], Tensor], hf: HfConfig) -> str:
    try:
        return activation_name(function)
    except ModelError as error:
        raise _refusal(hf, str(error).rstrip(".")) from error


def _names(bridge: MegatronModelBridge) -> Names:
    """Return the tensor names of parameters in our layout table; the mappings also list Transformer Engine's names."""
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


def _keys(bridge: MegatronModelBridge, provider: GPTModelProvider, hf: HfConfig) -> Keys:
    mixture = bool(provider.num_moe_experts)
    keys: dict[str, tuple[str, ...]] = {}
    for key, megatron in bridge.CONFIG_MAPPING:
        field = SHAPE_NAMES.get(megatron, "")
        if field in SIZES and key in hf and (field != "ffn") == mixture:
            keys[field] = (*keys.get(field, ()), key)
    if provider.moe_shared_expert_intermediate_size:
        keys["shared_ffn"] = tuple(key for key in SHARED_FFN if key in hf) or SHARED_FFN[:1]
    return keys


def _refusal(hf: HfConfig, reason: str) -> CheckpointError:
    return CheckpointError(
        f"model_type {hf['model_type']!r} is not built in, and Megatron-Bridge's version is not supported: {reason}. "
        "docs/families.md lists what can be supported."
    )
