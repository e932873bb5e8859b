"""Write `config.json` in the flat form that every reader of Hugging Face folders understands."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from ..model import ModelConfig
from .families import family_of
from .family import Family

__all__ = ["Architecture", "exported_config", "flat_config"]

Architecture = Literal["auto", "own"]

OF_ANY_FAMILY = ("bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "use_cache")
"""Settings that a Qwen2 and a Llama read alike, besides those that `flat_config` writes."""


def exported_config(config: ModelConfig, architecture: Architecture) -> ModelConfig:
    """The config under whose family a model is exported: its own, or with `auto` one of the same function that more
    clients read.

    Many clients take a Qwen2's head size to be hidden / heads, whatever its `head_dim` says, and read a Llama's. A
    Llama with `attention_bias` computes the same, where the bias of the attention's output is zero.
    """
    shape, source = config.shape, config.source
    whole_heads = shape.hidden == shape.heads * shape.head_dim
    as_llama = shape.hidden % shape.heads == 0 and config.window is None  # transformers reads no other Llama
    if architecture == "own" or source.get("model_type") != "qwen2" or whole_heads or not as_llama:
        return config
    kept = {key: source.get(key) for key in OF_ANY_FAMILY if key in source or key.endswith("_token_id")}
    return replace(config, source={**kept, "model_type": "llama", "attention_bias": True, "mlp_bias": False})


def flat_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """`config.json` in the flat form that transformers 4.x and 5.x, vLLM and TensorRT-LLM read alike.

    A config as transformers 5 saves it (`rope_parameters`) loads in 4.57 with a wrong rotary base, silently.
    """
    shape, source = config.shape, dict(config.source)
    for nested in ("rope_parameters", "dtype", "transformers_version", "_name_or_path", "layer_types"):
        source.pop(nested, None)
    source.setdefault("model_type", "llama")
    family = family_of(source)
    if (config.rotary_share, family.defaults.get("partial_rotary_factor", 1)) != (1, 1):
        source["partial_rotary_factor"] = config.rotary_share
    if "use_sliding_window" in family.read:
        source |= _window(config, family)
    return {
        **source,
        "architectures": [family.architecture],
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        **{key: getattr(shape, field) for field, keys in family.keys.items() for key in keys},
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_groups,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "hidden_act": config.activation,
        family.eps: config.norm_eps,
        "rope_theta": config.rotary_base,
        "rope_scaling": dict(config.rotary_scaling) if config.rotary_scaling else None,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.init_std,
        "torch_dtype": dtype,
    }


def _window(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The keys of a family whose windows may be of some layers: here all layers have one, or none has."""
    if config.window is None:
        return {"use_sliding_window": False}
    said: dict[str, Any] = {"use_sliding_window": True, "sliding_window": config.window}
    if "layer_types" in family.read:
        said |= {"max_window_layers": 0, "layer_types": ["sliding_attention"] * config.shape.layers}
    return said
