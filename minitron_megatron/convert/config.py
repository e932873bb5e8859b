"""Read `config.json`: the ModelConfig that a Hugging Face config describes. Each key is honoured as the installed
transformers honours it, or known to change nothing, or refused by name."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, did_you_mean
from ..layout import Shape
from ..model import ModelConfig
from .bridge import check_bridged
from .families import family_of
from .family import Family
from .keys import DERIVED, DROPPED, FREE, LARGEST, ONLY, POSITIVE, READ, SHARE, SIZE, Kind
from .weights import Weights, stored

__all__ = ["read_config", "tied_names"]

ROPE: Mapping[str, Mapping[str, Kind]] = {
    "default": {},
    "linear": {"factor": POSITIVE},
    "llama3": {
        "factor": POSITIVE,
        "low_freq_factor": POSITIVE,
        "high_freq_factor": POSITIVE,
        "original_max_position_embeddings": SIZE,
    },
}
"""The kinds of rotary embedding, and the constants that each needs."""
ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
MOST_EXPERTS = 1_000_000
"""In all layers together."""


def read_config(folder: Path) -> ModelConfig:
    """The config of a Hugging Face folder, in the flat form of transformers 4.x or the nested one of 5.x.

    Where the folder holds weights, their headers have a say as in transformers: quantised ones are refused, and an
    output layer that differs from the embedding is not tied. Raises CheckpointError where the folder, its config or
    its family is not what we can load.
    """
    config = _said(folder)
    weights = stored(folder)
    if weights is None:
        return config
    weights.refuse_quantised()
    return _untied(config, weights) if config.shape.tied else config


def tied_names(config: ModelConfig) -> tuple[str, str]:
    """The tensors' names of the embedding and of the output layer."""
    names = family_of(config.source).hf_names
    (embedding,), (head,) = names("embedding.word_embeddings.weight").values(), names("output_layer.weight").values()
    return embedding, head


def _untied(config: ModelConfig, weights: Weights) -> ModelConfig:
    """As transformers 5 has it: tied by config, and two matrices that differ in the file, is not tied."""
    embedding, head = tied_names(config)
    if embedding in weights and head in weights and not weights.alike(embedding, head):
        _say_once(
            f"{weights.folder} says tie_word_embeddings: true and holds {head}, which differs from {embedding}: "
            "the two are read, and stay apart, as in transformers 5."
        )
        return replace(config, shape=replace(config.shape, tied=False))
    return config


# ---- what config.json says


def _said(folder: Path) -> ModelConfig:
    path = folder / "config.json"
    hf = _json(folder, path)
    if not isinstance(hf, dict) or not hf:
        raise CheckpointError(
            f"{path} holds {type(hf).__name__ if hf or hf is None else 'an empty ' + type(hf).__name__} and not a "
            "model's config. Copy it again."
        )
    family = family_of(hf)
    reader = _Reader(path, hf, family)
    reader.refuse_unsupported()
    config = _model_config(reader)
    if not family.strict:
        check_bridged(config)
    return config


def _json(folder: Path, path: Path) -> Any:
    if not path.is_file():
        have = "it has no config.json" if folder.is_dir() else "there is no such folder"
        raise CheckpointError(
            f"model {folder} is not a Hugging Face folder: {have}. Give a folder that save_pretrained wrote."
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from error
    except RecursionError as error:
        raise CheckpointError(f"{path} is nested too deeply to be read.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}.") from error


@dataclass
class _Reader:
    """The keys of one config, each checked when it is asked for."""

    path: Path
    hf: Mapping[str, Any]
    family: Family
    known: dict[str, Any] = field(default_factory=dict)
    """Values read so far, with defaults."""

    def refusal(self, key: str, value: Any, why: str) -> CheckpointError:
        said = repr(value)
        said = said if len(said) <= 80 else f"{said[:77]}..."
        return CheckpointError(f"{self.path} says {key}: {said}, {why}")

    def check(self, key: str, value: Any, kind: Kind) -> Any:
        if not kind.holds(value):
            raise self.refusal(key, value, f"which is not {kind.words}.")
        return value

    def read(self, key: str, kind: Kind) -> Any:
        """The value of a key, an absent one's default; raises CheckpointError where it is not of its kind."""
        value = self.hf.get(key, self.family.default(key))
        if value is None and key in self.family.nullable:
            value = DERIVED[key]
        if value is ...:
            raise CheckpointError(f"{self.path} does not say {key!r}. A {self.family.model_type} config must.")
        if key in DERIVED and value is DERIVED[key]:
            value = self.check(key, value(self.known), kind)
        elif key in self.hf:
            self.check(key, value, kind)
        self.known[key] = value
        return value

    def size(self, keys: tuple[str, ...]) -> int:
        """A size that a config may call in several ways, which must agree."""
        there = [key for key in keys if key in self.hf] or [keys[0]]
        values = [self.read(key, SIZE) for key in there]
        for key, value in zip(there, values, strict=True):
            if value != values[0]:
                raise self.refusal(key, value, f"and {there[0]}: {values[0]}. Remove the wrong one.")
        return int(values[0])

    def agreed(self, key: str, nested: Mapping[str, Any], kind: Kind) -> Any:
        """A constant of the rotary embedding, which may stand among its parameters, beside them, or in both alike."""
        if key not in nested:
            return self.read(key, kind)
        value = self.check(f"rope_parameters.{key}", nested[key], kind)
        if key in self.hf and self.hf[key] != value:
            raise self.refusal(key, self.hf[key], f"and {value!r} among the rope parameters. Remove the wrong one.")
        return value

    def kinds(self) -> Mapping[str, Kind]:
        """Every key that is read, sizes that families call differently aside."""
        unlike = {"rms_norm_eps", "norm_eps"} - {self.family.eps}
        return {key: kind for key, kind in {**READ, **self.family.read}.items() if key not in unlike}

    def refuse_unsupported(self) -> None:
        """Raise CheckpointError at a key that is not known, or has a value that is not supported.

        Those of a family that has no row here are for Megatron-Bridge to know.
        """
        if not self.family.strict:
            return
        only = {key: allowed for key, allowed in ONLY.items() if key not in self.family.read} | dict(self.family.only)
        sizes = {key for keys in self.family.keys.values() for key in keys}
        free = {key: kind for key, (kind, _) in {**FREE, **DROPPED, **self.family.free}.items() if key not in sizes}
        known = {*self.kinds(), *sizes, *free, *only}
        for key, value in self.hf.items():
            if key not in known:
                near = did_you_mean(key, known)
                raise self.refusal(key, value, f"a key that is not known.{near} Remove it if it changes nothing.")
            allowed = only.get(key, (value,))
            if not any(type(value) is type(each) and (value is each or value == each) for each in allowed):
                raise self.refusal(key, value, f"which is not supported; only {allowed[0]!r} is.")
            if key in free:
                self.check(key, value, free[key])


def _model_config(reader: _Reader) -> ModelConfig:
    family = reader.family
    for key, kind in reader.kinds().items():
        reader.read(key, kind)
    sizes = {name: reader.size(keys) for name, keys in family.keys.items()}
    said = reader.known
    base, share, scaling = _rope(reader)
    renormalises = said.get("norm_topk_prob", family.norm_topk_prob)
    _refuse_impossible(reader, sizes, share, renormalises)
    shape = Shape(
        layers=said["num_hidden_layers"],
        hidden=said["hidden_size"],
        heads=said["num_attention_heads"],
        kv_groups=said["num_key_value_heads"],
        head_dim=said["head_dim"],
        vocab=said["vocab_size"],
        tied=said["tie_word_embeddings"],
        **({"ffn": 0} | sizes | dict(family.shape)),
    )
    return ModelConfig(
        shape=shape,
        norm_eps=said[family.eps],
        rotary_base=base,
        rotary_scaling=scaling,
        rotary_share=share,
        max_positions=said["max_position_embeddings"],
        window=_window(reader),
        init_std=said["initializer_range"],
        router_pre_softmax=not renormalises,
        source=_without_dropped(reader),
        **family.functions,
    )


def _rope(reader: _Reader) -> tuple[float, float, dict[str, Any] | None]:
    """Rotary base, rotated share of a head, and the scaling's constants."""
    known = reader.known
    forms = {key: known[key] for key in ("rope_parameters", "rope_scaling") if known[key]}
    if len(forms) == 2 and forms["rope_parameters"] != forms["rope_scaling"]:
        raise reader.refusal("rope_scaling", known["rope_scaling"], "and rope_parameters otherwise. Remove one.")
    where = next(iter(forms), "rope_parameters")
    nested: dict[str, Any] = forms.get(where, {})
    kind = nested.get("rope_type", nested.get("type", "default"))
    if nested.get("type", kind) != kind:
        raise reader.refusal(f"{where}.type", nested["type"], f"and rope_type: {kind!r}. Remove the wrong one.")
    if kind not in reader.family.rope:
        kinds = " and ".join(map(repr, reader.family.rope))
        raise reader.refusal(
            "rope_type", kind, f"which is not supported in {where} of {reader.family.model_type}; {kinds} are."
        )
    constants = ROPE[kind]
    for key in nested:
        if key not in (*ROPE_KEYS, *constants):
            near = did_you_mean(key, (*ROPE_KEYS, *constants))
            raise reader.refusal(f"{where}.{key}", nested[key], f"which rope_type {kind!r} does not have.{near}")
    base, share = float(reader.agreed("rope_theta", nested, POSITIVE)), _share(reader, where, nested)
    scaling = {key: _constant(reader, where, nested, kind, key) for key in constants}
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise reader.refusal(f"{where}.high_freq_factor", scaling["high_freq_factor"], "not above low_freq_factor.")
    return base, share, {"rope_type": kind, **scaling} if constants else None


def _constant(reader: _Reader, where: str, nested: Mapping[str, Any], kind: str, key: str) -> Any:
    if key == "original_max_position_embeddings":
        return reader.agreed(key, nested, SIZE) or reader.known["max_position_embeddings"]
    if key not in nested:
        raise CheckpointError(f"{reader.path} does not say {key!r} of {where}. rope_type {kind!r} needs it.")
    return reader.check(f"{where}.{key}", nested[key], ROPE[kind][key])


def _share(reader: _Reader, where: str, nested: Mapping[str, Any]) -> float:
    """The rotated share of a head, which most families do not have: transformers' versions take it there unlike."""
    key = "partial_rotary_factor"
    if key in reader.family.read:
        return float(reader.agreed(key, nested, SHARE))
    if reader.check(f"{where}.{key}", nested.get(key, 1.0), SHARE) != 1:
        raise reader.refusal(
            f"{where}.{key}", nested[key], f"which is not supported in {reader.family.model_type}; only 1.0 is."
        )
    return 1.0


def _window(reader: _Reader) -> int | None:
    """The tokens that a token attends to, itself among them; None: all before it."""
    said, layers = reader.known, reader.known["num_hidden_layers"]
    window: int | None = said.get("sliding_window") if said.get("use_sliding_window", True) else None
    if "layer_types" not in said:
        return window
    types, first = said["layer_types"], said["max_window_layers"] if window else layers
    if types is None:
        types = ["full_attention"] * min(first, layers) + ["sliding_attention"] * max(layers - first, 0)
    if len(types) != layers:
        raise reader.refusal("layer_types", types, f"{len(types)} of them, and num_hidden_layers: {layers}.")
    if "sliding_attention" not in types:
        return None
    if window is None:
        raise reader.refusal("layer_types", types, "and no sliding_window that is used. Make all full_attention.")
    if "full_attention" in types:
        raise reader.refusal(
            "use_sliding_window", True, f"of {types.count('sliding_attention')} layers of {layers}: windows of some "
            "layers are not supported. Set it to false to go on with sequences no longer than the window.",
        )  # fmt: skip
    return window


def _refuse_impossible(reader: _Reader, sizes: Mapping[str, int], share: float, renormalises: bool) -> None:
    """Raise CheckpointError where keys that are each right make no model together."""
    said = reader.known
    heads, groups, width = said["num_attention_heads"], said["num_key_value_heads"], said["head_dim"]
    if heads % groups:
        raise reader.refusal("num_key_value_heads", groups, f"which does not divide num_attention_heads: {heads}.")
    if heads * width > LARGEST:
        raise reader.refusal("head_dim", width, f"too much for num_attention_heads: {heads}.")
    if int(width * share) % 2 or not int(width * share):
        key = "head_dim" if share == 1 else "partial_rotary_factor"
        raise reader.refusal(key, width if share == 1 else share, "of which no pairs of channels can be rotated.")
    pad = reader.hf.get("pad_token_id", reader.family.defaults.get("pad_token_id"))
    if isinstance(pad, int) and pad >= said["vocab_size"]:
        raise reader.refusal("pad_token_id", pad, f"beyond vocab_size: {said['vocab_size']}.")
    if "experts" in sizes:
        _refuse_experts(reader, sizes, renormalises)


def _refuse_experts(reader: _Reader, sizes: Mapping[str, int], renormalises: bool) -> None:
    experts, chosen, layers = sizes["experts"], sizes["experts_per_token"], reader.known["num_hidden_layers"]
    if experts * layers > MOST_EXPERTS:
        raise reader.refusal(reader.family.keys["experts"][0], experts, f"too many for num_hidden_layers: {layers}.")
    if chosen > experts:
        raise reader.refusal("num_experts_per_tok", chosen, f"more than {reader.family.keys['experts'][0]}: {experts}.")
    if chosen == 1 and renormalises:
        raise reader.refusal(
            "num_experts_per_tok", chosen, "which is not supported where a token's experts are weighed among "
            "themselves: megatron-core needs 2 or more.",
        )  # fmt: skip


def _without_dropped(reader: _Reader) -> dict[str, Any]:
    """The config without the keys that are true of its own folder alone; said once.

    By its auto_map Megatron-Bridge knows a family that has no row here.
    """
    dropped = {key: reason for key, (_, reason) in DROPPED.items() if reader.family.strict or key != "auto_map"}
    if gone := [key for key in dropped if reader.hf.get(key)]:
        _say_once(f"{reader.path}: {' and '.join(gone)} go no further: {'; '.join(dropped[key] for key in gone)}.")
    return {key: value for key, value in reader.hf.items() if key not in dropped}


@cache
def _say_once(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=2)
