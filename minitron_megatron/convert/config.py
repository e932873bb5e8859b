"""Read `config.json`: the ModelConfig that a Hugging Face config describes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..layout import Shape
from ..model import ModelConfig
from .bridge import check_bridged
from .families import FAMILIES, family_of

__all__ = ["read_config"]

ROPE: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""The kinds of rotary embedding, and the constants that each needs."""


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
    family_of(hf)
    _refuse_unsupported(path, hf)
    try:
        config = _model_config(hf)
    except KeyError as error:
        raise CheckpointError(f"{path} does not say {error}. A {hf['model_type']} config must.") from error
    if hf["model_type"] not in FAMILIES:
        check_bridged(config)
    return config


def _refuse_unsupported(path: Path, hf: Mapping[str, Any]) -> None:
    """A setting that would change the function silently is an error."""
    for key, allowed in family_of(hf).only.items():
        if hf.get(key, allowed[0]) not in allowed:
            raise CheckpointError(f"{path} says {key}: {hf[key]!r}, which is not supported; only {allowed[0]!r} is.")
    kind = _rope(hf)[1].get("rope_type", "default")
    if kind not in ROPE:
        raise CheckpointError(f"{path} says rope_type: {kind!r}, which is not supported; {', '.join(ROPE)} are.")
    window = hf.get("sliding_window") if hf.get("use_sliding_window", True) else None
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
    base, rope = _rope(hf)
    constants, family = ROPE[rope["rope_type"]], family_of(hf)
    shape = Shape(
        layers=hf["num_hidden_layers"],
        hidden=hf["hidden_size"],
        heads=heads,
        kv_groups=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        vocab=hf["vocab_size"],
        tied=hf.get("tie_word_embeddings", False),
        **({"ffn": 0} | {field: _first(hf, keys) for field, keys in family.keys.items()} | dict(family.shape)),
    )
    return ModelConfig(
        shape=shape,
        norm_eps=hf[family.eps],
        rotary_base=base,
        rotary_scaling={key: rope[key] for key in ("rope_type", *constants)} if constants else None,
        rotary_share=rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor", family.rotary_share),
        max_positions=hf.get("max_position_embeddings", 2048),
        init_std=hf.get("initializer_range", 0.02),
        router_pre_softmax=not hf.get("norm_topk_prob", family.renormalises),
        source=hf,
        **family.functions,
    )


def _first(hf: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """What a config says under the first of these keys that it has."""
    return hf[next((key for key in keys if key in hf), keys[0])]
