"""Write `config.json` in the flat form that every reader of Hugging Face folders understands."""

from __future__ import annotations

from typing import Any

from ..model import ModelConfig
from .families import family_of
from .family import Family

__all__ = ["flat_config"]


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
