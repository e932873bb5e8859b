"""The model families: what Hugging Face calls each parameter, and what its config says."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, did_you_mean
from ..layout import Shape, lookup
from ..model import ModelConfig

__all__ = ["FAMILIES", "Family", "flat_config", "read_config"]

WHOLE = ""
"""The role of a Hugging Face tensor that is all of a Megatron one."""

Names = Mapping[str, Mapping[str, str]]
"""Megatron pattern -> role -> Hugging Face pattern."""


@dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face."""

    model_type: str
    architecture: str
    names: Names

    def hf_names(self, name: str) -> dict[str, str]:
        """role -> Hugging Face tensor, for a parameter's global Megatron name."""
        parts = name.split(".")
        layer = parts[2] if name.startswith("decoder.layers.") else ""
        pattern = ".".join([*parts[:2], "*", *parts[3:]]) if layer else name
        return {role: hf.replace("*", layer) for role, hf in self.names[pattern].items()}

    def tensors(self, shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Every Hugging Face tensor of a shape with its own shape, in the order of the layers."""
        sizes = shape.sizes(padded=False)
        for name in shape.names():
            param = lookup(name)
            whole = param.shape(sizes)
            for role, hf in self.hf_names(name).items():
                yield hf, (len(param.role_rows(0, role, sizes)), *whole[1:]) if role != WHOLE else whole


HF_LAYER, LAYER = "model.layers.*.", "decoder.layers.*."
LLAMA_NAMES: Names = {
    "embedding.word_embeddings.weight": {WHOLE: "model.embed_tokens.weight"},
    LAYER + "input_layernorm.weight": {WHOLE: HF_LAYER + "input_layernorm.weight"},
    LAYER + "self_attention.linear_qkv.weight": {
        role: f"{HF_LAYER}self_attn.{role}_proj.weight" for role in ("q", "k", "v")
    },
    LAYER + "self_attention.linear_proj.weight": {WHOLE: HF_LAYER + "self_attn.o_proj.weight"},
    LAYER + "pre_mlp_layernorm.weight": {WHOLE: HF_LAYER + "post_attention_layernorm.weight"},
    LAYER + "mlp.linear_fc1.weight": {role: f"{HF_LAYER}mlp.{role}_proj.weight" for role in ("gate", "up")},
    LAYER + "mlp.linear_fc2.weight": {WHOLE: HF_LAYER + "mlp.down_proj.weight"},
    "decoder.final_layernorm.weight": {WHOLE: "model.norm.weight"},
    "output_layer.weight": {WHOLE: "lm_head.weight"},
}

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", LLAMA_NAMES),
        Family("mistral", "MistralForCausalLM", LLAMA_NAMES),
    )
}


def read_config(folder: Path) -> ModelConfig:
    """The config of a Hugging Face folder, in the flat form of transformers 4.x or the nested one of 5.x.

    Raises CheckpointError where the folder, its config or its family is not what we can load.
    """
    path = folder / "config.json"
    if not path.is_file():
        have = "it has no config.json" if folder.is_dir() else "there is no such folder"
        raise CheckpointError(
            f"model {folder} is not a Hugging Face folder: {have}. Give a folder that save_pretrained wrote."
        )
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from error
    family(hf)
    _refuse_unsupported(path, hf)
    try:
        return _model_config(hf)
    except KeyError as error:
        raise CheckpointError(f"{path} does not say {error}. A {hf['model_type']} config must.") from error


def family(hf: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face config; raises CheckpointError where there is none."""
    model_type = str(hf.get("model_type"))
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"model_type {model_type!r} is not supported.{did_you_mean(model_type, FAMILIES)} "
            f"Known: {', '.join(FAMILIES)}."
        )
    return FAMILIES[model_type]


def _refuse_unsupported(path: Path, hf: Mapping[str, Any]) -> None:
    """A setting that would change the function silently is an error."""
    wanted = {"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,)}
    for key, allowed in wanted.items():
        if hf.get(key, allowed[0]) not in allowed:
            raise CheckpointError(f"{path} says {key}: {hf[key]!r}, which is not supported; only {allowed[0]!r} is.")
    kind = _rope(hf)[1].get("rope_type", "default")
    if kind not in ("default", "linear", "llama3"):
        raise CheckpointError(
            f"{path} says rope_type: {kind!r}, which is not supported; default, linear and llama3 are."
        )
    window = hf.get("sliding_window")
    if window is not None and window < hf.get("max_position_embeddings", 2048):
        raise CheckpointError(
            f"{path} says sliding_window: {window}, and attention here is over the whole sequence. "
            f"Set it to null and max_position_embeddings to {window} to go on with shorter sequences."
        )


def _rope(hf: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """Rotary base, and the scaling parameters without it."""
    nested = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    base = nested.pop("rope_theta", None) or hf.get("rope_theta", 10000.0)
    nested.setdefault("rope_type", nested.pop("type", "default"))
    return float(base), nested


def _model_config(hf: Mapping[str, Any]) -> ModelConfig:
    heads = hf["num_attention_heads"]
    base, scaling = _rope(hf)
    shape = Shape(
        layers=hf["num_hidden_layers"],
        hidden=hf["hidden_size"],
        ffn=hf["intermediate_size"],
        heads=heads,
        kv_groups=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        vocab=hf["vocab_size"],
        tied=hf.get("tie_word_embeddings", False),
    )
    return ModelConfig(
        shape=shape,
        norm_eps=hf["rms_norm_eps"],
        rotary_base=base,
        rotary_scaling=scaling if scaling["rope_type"] != "default" else None,
        max_positions=hf.get("max_position_embeddings", 2048),
        init_std=hf.get("initializer_range", 0.02),
        source=hf,
    )


def flat_config(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """`config.json` in the flat form that transformers 4.x and 5.x, vLLM and TensorRT-LLM read alike.

    A config as transformers 5 saves it (`rope_parameters`) loads in 4.57 with a wrong rotary base, silently.
    """
    shape, source = config.shape, dict(config.source)
    for nested in ("rope_parameters", "dtype", "transformers_version", "_name_or_path", "layer_types"):
        source.pop(nested, None)
    source.setdefault("model_type", "llama")
    return {
        **source,
        "architectures": [FAMILIES[source["model_type"]].architecture],
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_groups,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rotary_base,
        "rope_scaling": dict(config.rotary_scaling) if config.rotary_scaling else None,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.init_std,
        "torch_dtype": dtype,
    }
