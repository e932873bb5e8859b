"""Hugging Face `config.json` -> ModelConfig.

Each key is read as the installed transformers reads it, or known to change nothing, or refused by name.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from ..errors import CheckpointError, FileError, did_you_mean
from ..files import read_json
from ..layout import Shape
from ..model import ModelConfig
from ..wrong_values import kind_of
from .bridge import check_bridged
from .families import family_of
from .family import Family
from .keys import DERIVED, DROPPED, FREE, LARGEST, ONLY, POSITIVE, READ, SHARE, SIZE, HfConfig, Kind
from .weights import Weights, stored

__all__ = ["parsed", "read_config", "tied_names"]

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
"""Supported rope types, and the constants that each needs."""
ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
MOST_EXPERTS = 1_000_000
"""Limit on experts x layers."""


def read_config(folder: Path) -> ModelConfig:
    """Read the config of a Hugging Face folder, in the flat form of transformers 4.x or the nested one of 5.x.

    If the folder holds weights, their headers are checked too, as transformers does: quantised weights are refused, and
    an output layer that differs from the embedding is not tied. Raises CheckpointError if the folder, its config or its
    family cannot be loaded.
    """
    config = _parse(folder)
    weights = stored(folder)
    if weights is None:
        return config
    weights.refuse_quantised()
    return _untied(config, weights) if config.shape.tied else config


def tied_names(config: ModelConfig) -> tuple[str, str]:
    """Return the tensor names of the embedding and of the output layer."""
    names = family_of(config.source).hf_names
    (embedding,), (head,) = names("embedding.word_embeddings.weight").values(), names("output_layer.weight").values()
    return embedding, head


def _untied(config: ModelConfig, weights: Weights) -> ModelConfig:
    """Untie the embeddings if the file holds two matrices that differ, as transformers 5 does."""
    embedding, head = tied_names(config)
    if embedding in weights and head in weights and not weights.same_values(embedding, head):
        _warn_once(
            f"{weights.folder} says tie_word_embeddings: true but holds {head}, which differs from {embedding}: "
            "both are read and stay untied, as in transformers 5."
        )
        return replace(config, shape=replace(config.shape, tied=False))
    return config


# ---- keys of config.json


def _parse(folder: Path) -> ModelConfig:
    path = folder / "config.json"
    hf = _json(folder, path)
    if not isinstance(hf, dict) or not hf:
        raise CheckpointError(
            f"{path} holds {'no keys' if hf == {} else kind_of(hf)}, not a model's config. Copy it again."
        )
    return parsed(hf, path)


def parsed(hf: HfConfig, path: Path) -> ModelConfig:
    """Return the config that `hf` describes. path: its file, for errors. Raises CheckpointError."""
    family = family_of(hf)
    reader = _Reader(path, hf, family)
    reader.refuse_unsupported()
    config = _model_config(reader)
    if not family.strict:
        check_bridged(config)
    return config


def _json(folder: Path, path: Path) -> object:
    if not path.is_file():
        problem = "it has no config.json" if folder.is_dir() else "there is no such folder"
        raise CheckpointError(
            f"model {folder} is not a Hugging Face folder: {problem}. Give a folder that save_pretrained wrote."
        )
    try:
        return read_json(path)
    except FileError as error:
        raise CheckpointError(str(error)) from error


T = TypeVar("T")


@dataclass
class _Reader:
    """Keys of one config, each checked when it is read."""

    path: Path
    hf: HfConfig
    family: Family
    known: dict[str, Any] = field(default_factory=dict)
    """Values read so far, with defaults."""

    def refusal(self, key: str, value: object, why: str) -> CheckpointError:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        return CheckpointError(f"{self.path} says {key}: {shown}, {why}")

    def check(self, key: str, value: T, kind: Kind) -> T:
        if not kind.holds(value):
            raise self.refusal(key, value, f"which is not {kind.words}.")
        return value

    def read(self, key: str, kind: Kind) -> Any:
        """Return the value of a key, or its default. Raises CheckpointError if the value is not of the kind."""
        value = self.hf.get(key, self.family.default(key))
        if value is None and key in self.family.nullable:
            value = DERIVED[key]
        if value is ...:
            raise self.missing(key)
        if key in DERIVED and value is DERIVED[key]:
            value = self.check(key, value(self.known), kind)
        elif key in self.hf:
            self.check(key, value, kind)
        self.known[key] = value
        return value

    def missing(self, *keys: str) -> CheckpointError:
        names = " or ".join(map(repr, keys))
        return CheckpointError(f"{self.path} does not say {names}. A {self.family.model_type} config must.")

    def present(self, keys: tuple[str, ...]) -> list[str]:
        """Return those of a size's keys that the config has, or the family's first one."""
        return [key for key in keys if key in self.hf] or [keys[0]]

    def size(self, keys: tuple[str, ...]) -> int:
        """Return a size that a config may give under several keys, which must agree."""
        present = self.present(keys)
        if present[0] not in self.hf and self.family.default(keys[0]) is ...:
            raise self.missing(*keys)
        values = [self.read(key, SIZE) for key in present]
        for key, value in zip(present, values, strict=True):
            if value != values[0]:
                raise self.refusal(key, value, f"but {present[0]}: {values[0]}. Remove the wrong one.")
        return int(values[0])

    def agreed(self, key: str, where: str, nested: HfConfig, kind: Kind) -> Any:
        """Return a rope constant from `nested`, the rope parameters under the key `where`, or from the top level; if
        both have it, they must agree."""
        if key not in nested:
            return self.read(key, kind)
        value = self.check(f"{where}.{key}", nested[key], kind)
        if key in self.hf and self.hf[key] != value:
            raise self.refusal(key, self.hf[key], f"but {value!r} among the rope parameters. Remove the wrong one.")
        return value

    def kinds(self) -> Mapping[str, Kind]:
        """Return every key that is read, except sizes whose keys differ between families."""
        unused = {"rms_norm_eps", "norm_eps"} - {self.family.eps}
        return {key: kind for key, kind in {**READ, **self.family.read}.items() if key not in unused}

    def refuse_unsupported(self) -> None:
        """Raise CheckpointError for an unknown key or an unsupported value.

        Keys of a family without a row in `families.py` are left to Megatron-Bridge.
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
                raise self.refusal(key, value, f"an unknown key.{near} Remove it if it changes nothing.")
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
    values = reader.known
    base, share, scaling = _rope(reader)
    renormalises = values.get("norm_topk_prob", family.norm_topk_prob)
    _refuse_impossible(reader, sizes, share, renormalises)
    shape = Shape(
        layers=values["num_hidden_layers"],
        hidden=values["hidden_size"],
        heads=values["num_attention_heads"],
        kv_groups=values["num_key_value_heads"],
        head_dim=values["head_dim"],
        vocab=values["vocab_size"],
        tied=values["tie_word_embeddings"],
        **({"ffn": 0} | sizes | dict(family.shape)),
    )
    return ModelConfig(
        shape=shape,
        norm_eps=values[family.eps],
        rotary_base=base,
        rotary_scaling=scaling,
        rotary_share=share,
        max_positions=values["max_position_embeddings"],
        window=_window(reader),
        init_std=values["initializer_range"],
        router_pre_softmax=not renormalises,
        source=_without_dropped(reader),
        **family.functions,
    )


def _rope(reader: _Reader) -> tuple[float, float, HfConfig | None]:
    """Return (rotary base, rotated share of a head, constants of the scaling)."""
    known = reader.known
    forms = {key: known[key] for key in ("rope_parameters", "rope_scaling") if known[key]}
    if len(forms) == 2 and forms["rope_parameters"] != forms["rope_scaling"]:
        raise reader.refusal("rope_scaling", known["rope_scaling"], "but rope_parameters differ. Remove one.")
    where = next(iter(forms), "rope_parameters")
    nested: HfConfig = forms.get(where, {})
    kind = nested.get("rope_type", nested.get("type", "default"))
    if nested.get("type", kind) != kind:
        raise reader.refusal(f"{where}.type", nested["type"], f"but rope_type: {kind!r}. Remove the wrong one.")
    if kind not in reader.family.rope:
        kinds = " and ".join(map(repr, reader.family.rope))
        raise reader.refusal(
            "rope_type", kind, f"which is not supported in {where} of {reader.family.model_type}; only {kinds}."
        )
    constants = ROPE[kind]
    for key in nested:
        if key not in (*ROPE_KEYS, *constants):
            near = did_you_mean(key, (*ROPE_KEYS, *constants))
            raise reader.refusal(
                f"{where}.{key}", nested[key], f"which rope_type {kind!r} does not use.{near} Remove it."
            )
    base, share = float(reader.agreed("rope_theta", where, nested, POSITIVE)), _share(reader, where, nested)
    scaling = {key: _constant(reader, where, nested, kind, key) for key in constants}
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise reader.refusal(
            f"{where}.high_freq_factor", scaling["high_freq_factor"], "which is not above low_freq_factor. Correct one."
        )
    return base, share, {"rope_type": kind, **scaling} if constants else None


def _constant(reader: _Reader, where: str, nested: HfConfig, kind: str, key: str) -> float:
    if key == "original_max_position_embeddings":
        return reader.agreed(key, where, nested, SIZE) or reader.known["max_position_embeddings"]
    if key not in nested:
        raise CheckpointError(f"{reader.path} lacks {key!r} in {where}. rope_type {kind!r} needs it.")
    return reader.check(f"{where}.{key}", nested[key], ROPE[kind][key])


def _share(reader: _Reader, where: str, nested: HfConfig) -> float:
    """Return the rotated share of a head. Only families that read the key may set it; transformers versions differ."""
    key = "partial_rotary_factor"
    if key in reader.family.read:
        return float(reader.agreed(key, where, nested, SHARE))
    if reader.check(f"{where}.{key}", nested.get(key, 1.0), SHARE) != 1:
        raise reader.refusal(
            f"{where}.{key}", nested[key], f"which is not supported in {reader.family.model_type}; only 1.0 is."
        )
    return 1.0


def _window(reader: _Reader) -> int | None:
    """Return the attention window in tokens, the token itself included; None: no window."""
    values, layers = reader.known, reader.known["num_hidden_layers"]
    window: int | None = values.get("sliding_window") if values.get("use_sliding_window", True) else None
    if "layer_types" not in values:
        return window
    types, first = values["layer_types"], values["max_window_layers"] if window else layers
    if types is None:
        types = ["full_attention"] * min(first, layers) + ["sliding_attention"] * max(layers - first, 0)
    if len(types) != layers:
        raise reader.refusal(
            "layer_types", types, f"{len(types)} of them, but num_hidden_layers: {layers}. Correct one."
        )
    if "sliding_attention" not in types:
        return None
    if window is None:
        raise reader.refusal("layer_types", types, "but no sliding_window is in use. Make all full_attention.")
    if "full_attention" in types:
        raise reader.refusal(
            "use_sliding_window", True, f"in {types.count('sliding_attention')} layers of {layers}: windows in some "
            "layers only are not supported. Set it to false if sequences are no longer than the window.",
        )  # fmt: skip
    return window


def _refuse_impossible(reader: _Reader, sizes: Mapping[str, int], share: float, renormalises: bool) -> None:
    """Raise CheckpointError if keys that are valid on their own contradict each other."""
    values = reader.known
    heads, groups, width = values["num_attention_heads"], values["num_key_value_heads"], values["head_dim"]
    if heads % groups:
        raise reader.refusal(
            "num_key_value_heads", groups, f"which does not divide num_attention_heads: {heads}. Correct one."
        )
    if heads * width > LARGEST:
        raise reader.refusal("head_dim", width, f"too large with num_attention_heads: {heads}. Correct one.")
    if int(width * share) % 2 or not int(width * share):
        of_part = "" if share == 1 else f" with partial_rotary_factor: {share}"
        raise reader.refusal(
            "head_dim", width, f"which gives no even number of channels to rotate{of_part}. Correct it."
        )
    pad = reader.hf.get("pad_token_id", reader.family.defaults.get("pad_token_id"))
    if isinstance(pad, int) and pad >= values["vocab_size"]:
        raise reader.refusal("pad_token_id", pad, f"not below vocab_size: {values['vocab_size']}. Correct one.")
    if "experts" in sizes:
        _refuse_experts(reader, sizes, renormalises)


def _refuse_experts(reader: _Reader, sizes: Mapping[str, int], renormalises: bool) -> None:
    experts, chosen, layers = sizes["experts"], sizes["experts_per_token"], reader.known["num_hidden_layers"]
    key = reader.present(reader.family.keys["experts"])[0]
    if experts * layers > MOST_EXPERTS:
        raise reader.refusal(key, experts, f"too many with num_hidden_layers: {layers}. Correct one.")
    if chosen > experts:
        raise reader.refusal("num_experts_per_tok", chosen, f"more than {key}: {experts}. Correct one.")
    if chosen == 1 and renormalises:
        raise reader.refusal(
            "num_experts_per_tok", chosen, "which is not supported where router weights are normalised over the chosen "
            "experts (norm_topk_prob): megatron-core needs 2 or more.",
        )  # fmt: skip


def _without_dropped(reader: _Reader) -> HfConfig:
    """Return the config without the keys that hold only for its own folder; warn about them once.

    `auto_map` is kept for families without a row in `families.py`: Megatron-Bridge identifies them by it.
    """
    dropped = {key: reason for key, (_, reason) in DROPPED.items() if reader.family.strict or key != "auto_map"}
    if gone := [key for key in dropped if reader.hf.get(key)]:
        _warn_once(f"{reader.path}: exports leave out {' and '.join(gone)}: {'; '.join(dropped[key] for key in gone)}.")
    return {key: value for key, value in reader.hf.items() if key not in dropped}


@cache
def _warn_once(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=2)
