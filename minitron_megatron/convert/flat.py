"""ModelConfig -> `config.json`, in the flat form that every reader of Hugging Face folders understands."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Literal

from ..errors import CheckpointError
from ..layout import Shape
from ..model import ModelConfig
from .config import parsed
from .families import FAMILIES, family_of
from .family import Family

__all__ = ["Architecture", "check_expressed", "exported_config", "flat_config", "with_family"]

Architecture = Literal["auto", "own"]

OF_ANY_FAMILY = ("bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "use_cache")
"""Settings with the same meaning in Qwen2 and Llama, besides those that `flat_config` writes."""


def exported_config(config: ModelConfig, architecture: Architecture) -> ModelConfig:
    """Return the config to export: the model's own, or with `auto` an equivalent one that more clients can read.

    Many clients ignore `head_dim` of a Qwen2 and assume hidden / heads, but read `head_dim` of a Llama. A Llama with
    `attention_bias` computes the same as a Qwen2 if the bias of the attention output is zero.
    """
    shape, source = config.shape, config.source
    standard_heads = shape.hidden == shape.heads * shape.head_dim
    as_llama = shape.hidden % shape.heads == 0 and config.window is None  # transformers refuses other Llamas
    if architecture == "own" or source.get("model_type") != "qwen2" or standard_heads or not as_llama:
        return config
    kept = {key: source.get(key) for key in OF_ANY_FAMILY if key in source or key.endswith("_token_id")}
    return replace(config, source={**kept, "model_type": "llama", "attention_bias": True, "mlp_bias": False})


def with_family(config: ModelConfig) -> ModelConfig:
    """Return a config with a source: for a model built elsewhere, the first family that expresses it.

    Raises CheckpointError, which names the setting that the nearest family lacks, where no family does.
    """
    if config.source:
        return config
    mixture = bool(config.shape.experts)
    names = [name for name, family in FAMILIES.items() if ("experts" in family.keys) == mixture]
    window = {} if config.window is None else {"sliding_window": config.window}
    sources = [
        {"model_type": name, "pad_token_id": None, **(window if "sliding_window" in FAMILIES[name].read else {})}
        for name in names
    ]  # Phi-3's default padding token is 32000
    nearest = min((replace(config, source=source) for source in sources), key=lambda each: len(_misread(each)))
    check_expressed(nearest)
    return nearest


def check_expressed(config: ModelConfig) -> None:
    """Raise CheckpointError, which names the setting, where `config.json` would be read as another model."""
    if problems := _misread(config):
        family = family_of(config.source).model_type
        raise CheckpointError(
            f"a config.json of {family} cannot express the model: {', '.join(problems)}. "
            "Change the setting, or write the model in a format of your own."
        )


def _misread(config: ModelConfig) -> list[str]:
    """Return what the config's `config.json` would be read as otherwise; an empty list if it says the config."""
    try:
        read = parsed(flat_config(config, "float32"), Path("config.json"))
    except CheckpointError as error:
        return [str(error).rstrip(".")]
    return [
        f"{field.name}={getattr(ours, field.name)!r} would be read as {getattr(theirs, field.name)!r}"
        for ours, theirs in ((config.shape, read.shape), (config, read))
        for field in fields(ours)
        if field.compare and field.type != Shape.__name__ and getattr(ours, field.name) != getattr(theirs, field.name)
    ]


def flat_config(config: ModelConfig, dtype: str) -> dict[str, object]:
    """Return `config.json` in the flat form that transformers 4.x and 5.x, vLLM and TensorRT-LLM read the same way.

    transformers 4.57 reads a config of transformers 5 (`rope_parameters`) with a wrong rotary base, without an error.
    """
    shape, source = config.shape, dict(config.source)
    for nested in ("rope_parameters", "dtype", "transformers_version", "_name_or_path", "layer_types"):
        source.pop(nested, None)
    source.setdefault("model_type", "llama")
    family = family_of(source)
    if (config.rotary_share, family.defaults.get("partial_rotary_factor", 1)) != (1, 1):
        source["partial_rotary_factor"] = config.rotary_share
    if "norm_topk_prob" in family.read:
        source["norm_topk_prob"] = not config.router_pre_softmax
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


def _window(config: ModelConfig, family: Family) -> dict[str, object]:
    """Return the window keys of a family that allows windows per layer; here all layers have one or none has."""
    if config.window is None:
        return {"use_sliding_window": False}
    keys: dict[str, object] = {"use_sliding_window": True, "sliding_window": config.window}
    if "layer_types" in family.read:
        keys |= {"max_window_layers": 0, "layer_types": ["sliding_attention"] * config.shape.layers}
    return keys
