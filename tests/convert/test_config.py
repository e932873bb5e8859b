"""`config.json` is read as the installed transformers reads it, or refused by name: no third outcome."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.convert import FAMILIES, read_config
from minitron_megatron.convert.config import _Reader
from minitron_megatron.convert.keys import DERIVED, DROPPED, FREE, ONLY
from minitron_megatron.errors import CheckpointError
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool

from ..compat import configs

SAMPLE = 151
"""Only every so many variants of tests/compat/configs.py are tried here; that script runs all."""
REQUIRED = {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"}
NOT_OF_A_FILE = {"_attn_implementation_internal", "_experts_implementation_internal", "ignore_keys_at_rope_validation"}


def config_of_transformers(family: str, **keys: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(family, **keys)


def reader_of(family: str) -> _Reader:
    return _Reader(Path("config.json"), {}, FAMILIES[family])


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_keys_mean_what_they_mean_in_transformers(family: str) -> None:
    row, reference = FAMILIES[family], config_of_transformers(family)
    assert row.defaults.get("pad_token_id") == reference.pad_token_id
    sizes = {key for keys in row.keys.values() for key in keys}
    for key in [*reader_of(family).kinds(), *sizes]:
        default = row.default(key)
        if default is ...:
            assert key in REQUIRED | sizes or getattr(reference, key) is None, key
            continue
        rope = reference.rope_parameters
        known = {"rope_theta": rope["rope_theta"], "partial_rotary_factor": rope.get("partial_rotary_factor")}
        if key in ("rope_parameters", "rope_scaling", "original_max_position_embeddings", "layer_types"):
            assert default is None
        elif key in known:
            assert default == known[key], key
        elif key in DERIVED and default is DERIVED[key]:
            values = {name: getattr(reference, name) for name in REQUIRED}
            assert default(values) == (getattr(reference, key, None) or default(values)), key
        elif key == "sliding_window" and "use_sliding_window" in row.read:
            assert default == next(each.default for each in fields(type(reference)) if each.name == key)
        else:
            assert default == getattr(reference, key), key


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_transformers_is_known(family: str) -> None:
    row, reference = FAMILIES[family], config_of_transformers(family)
    sizes = {key for keys in row.keys.values() for key in keys}
    known = {*reader_of(family).kinds(), *sizes, *ONLY, *row.only, *FREE, *row.free, *DROPPED}
    assert set(reference.to_dict()) | {each.name for each in fields(type(reference))} <= known | NOT_OF_A_FILE


def test_what_changes_nothing_has_a_reason() -> None:
    every = [*FREE.items(), *(item for family in FAMILIES.values() for item in family.free.items())]
    assert all(reason and kind.words for _, (kind, reason) in every)


def outcomes(topology: Topology, family: str, folder: Path, offset: int) -> list[str]:
    """Return the counts of equal and refused variants of a sample, and each variant that is neither."""
    flat = configs.make(family, folder)
    chosen = list(configs.variants(family, flat))[offset::SAMPLE]
    known: dict[str, Any] = {}
    found = [(variant, configs.check(variant, flat, folder, topology, known)) for variant in chosen]
    counts = {word: sum(each == word for _, each in found) for word in ("equal", "refused")}
    return [json.dumps(counts), *(f"{variant} -> {each}" for variant, each in found if each not in counts)]


@pytest.mark.parametrize(("offset", "family"), list(enumerate(FAMILIES)))
def test_a_config_is_read_as_transformers_reads_it_or_refused_by_name(
    pool: Pool, tmp_path: Path, family: str, offset: int
) -> None:
    [(counts, *wrong)] = pool.run(outcomes, family, tmp_path, offset)
    assert not wrong
    assert min(json.loads(counts).values()) > 0


# ---- one message each

BASE = {"model_type": "llama", **configs.SIZES, "intermediate_size": 40}
LAYERS = configs.SIZES["num_hidden_layers"]


def write_config(folder: Path, config: Any) -> Path:
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "text", ["[]", "null", '"llama"', "{}", "3", "[" * 100_000, '{"model_type": 1e999}', "\ufeff{}"]
)
def test_what_is_no_config_is_one_message(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_config(write_config(tmp_path, text))
    assert "config.json" in str(caught.value) or "model_type" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [([], "a list, not a model's config. Copy it again."), ({}, "no keys, not a model's config. Copy it again.")],
)
def test_json_that_is_no_config_is_named(tmp_path: Path, config: Any, said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_config(write_config(tmp_path, config))
    assert str(caught.value) == f"{tmp_path / 'config.json'} holds {said}"


@pytest.mark.parametrize("value", ["4", None, 0, -1, 10**9, 10**400, 2.0, True, [4], {}, float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size", "head_dim"])
def test_a_size_that_is_none_is_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    if key == "head_dim" and value is None:
        return
    said = rf"says {key}: .*, which is not a whole number from 1 to|is not JSON: {key} is (nan|inf)"
    with pytest.raises(CheckpointError, match=said) as caught:
        read_config(write_config(tmp_path, {**BASE, key: value}))
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 32}
REFUSED: Mapping[str, tuple[dict[str, Any], str]] = {
    "null base": ({"rope_theta": None}, "rope_theta"),
    "nested null base": ({"rope_scaling": {"type": "default", "rope_theta": None}}, "rope_scaling.rope_theta: None"),
    "null epsilon": ({"rms_norm_eps": None}, "rms_norm_eps"),
    "unknown": (
        {"num_hidden_layer": 3},
        "num_hidden_layer: 3, an unknown key. Did you mean 'num_hidden_layers'",
    ),
    "bidirectional": ({"is_causal": False}, "is_causal"),
    "part-rotated": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
    "nested part": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5"),
    "two scalings": (
        {"rope_scaling": LINEAR, "rope_parameters": {**LINEAR, "factor": 3.0}},
        f"says rope_scaling: {LINEAR}, but rope_parameters differ. Remove one.",
    ),
    "two bases": (
        {"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}},
        "says rope_theta: 5.0, but 6.0 among the rope parameters. Remove the wrong one.",
    ),
    "two kinds": (
        {"rope_scaling": {**LINEAR, "type": "default"}},
        "says rope_scaling.type: 'default', but rope_type: 'linear'. Remove the wrong one.",
    ),
    "unread constant": (
        {"rope_scaling": {**LINEAR, "factr": 3}},
        "says rope_scaling.factr: 3, which rope_type 'linear' does not use. Did you mean 'factor'? Remove it.",
    ),
    "absent constant": (
        {"rope_scaling": {"type": "linear"}},
        "lacks 'factor' in rope_scaling. rope_type 'linear' needs it.",
    ),
    "frequencies": (
        {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}},
        "says rope_scaling.high_freq_factor: 1.0, which is not above low_freq_factor. Correct one.",
    ),
    "scaling of nemotron": (
        {"model_type": "nemotron", "hidden_act": "relu2", "rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_type: 'linear', which is not supported in rope_scaling of nemotron; only 'default'",
    ),
    "groups": (
        {"num_key_value_heads": 3},
        "says num_key_value_heads: 3, which does not divide num_attention_heads: 4. Correct one.",
    ),
    "wide heads": (
        {"head_dim": 2**21},
        "says head_dim: 2097152, too large with num_attention_heads: 4. Correct one.",
    ),
    "odd head": (
        {"head_dim": 7},
        "says head_dim: 7, which gives no even number of channels to rotate. Correct it.",
    ),
    "odd part of a head": (
        {"model_type": "nemotron", "hidden_act": "relu2", "head_dim": 10, "partial_rotary_factor": 0.5},
        "says head_dim: 10, which gives no even number of channels to rotate with partial_rotary_factor: 0.5. Correct",
    ),
    "padding": ({"pad_token_id": 96}, "says pad_token_id: 96, not below vocab_size: 96. Correct one."),
    "kinds of layers": (
        {"model_type": "qwen2", "layer_types": ["full_attention"]},
        f"says layer_types: ['full_attention'], 1 of them, but num_hidden_layers: {LAYERS}. Correct one.",
    ),
    "no window": (
        {"model_type": "qwen2", "use_sliding_window": False, "layer_types": ["sliding_attention"] * LAYERS},
        "but no sliding_window is in use. Make all full_attention.",
    ),
    "no probability": ({"resid_pdrop": 2}, "resid_pdrop: 2, which is not a number from 0 to 1"),
    "true is not 1": ({"pretraining_tp": True}, "pretraining_tp: True"),
}


@pytest.mark.parametrize(("keys", "words"), REFUSED.values(), ids=REFUSED)
def test_what_would_be_another_model_is_refused_by_name(tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_config(write_config(tmp_path, {**BASE, **keys}))
    assert words in str(caught.value)


MIXTRAL = {**BASE, "model_type": "mixtral", "num_local_experts": 4}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob: False"),
        (
            {"num_experts": 5},
            "says num_experts: 5, but num_local_experts: 4. Remove the wrong one.",
        ),
        (
            {"num_local_experts": 10**6},
            f"says num_local_experts: 1000000, too many with num_hidden_layers: {LAYERS}. Correct one.",
        ),
        (
            {"num_experts_per_tok": 1},
            "says num_experts_per_tok: 1, which is not supported where router weights are normalised over the chosen "
            "experts (norm_topk_prob): megatron-core needs 2 or more.",
        ),
        ({"num_experts_per_tok": 5}, "says num_experts_per_tok: 5, more than num_local_experts: 4. Correct one."),
        ({"model_type": "qwen3_moe", "num_local_experts": 1, "moe_intermediate_size": 8}, "num_local_experts: 1"),
        ({"num_local_experts": 4, "num_experts": 0}, "num_experts: 0"),
    ],
)
def test_experts_that_cannot_be_are_refused_by_name(tmp_path: Path, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_config(write_config(tmp_path, {**MIXTRAL, **keys}))
    assert words in str(caught.value)


def test_each_family_has_its_own_defaults(tmp_path: Path) -> None:
    def read(family: str, *absent: str) -> Any:
        config = {**BASE, "model_type": family, **configs.FAMILIES[family]}
        return read_config(write_config(tmp_path, {key: value for key, value in config.items() if key not in absent}))

    assert read("mixtral", "rope_theta").rotary_base == 1e6
    assert read("mistral", "sliding_window").window == 4096
    assert read("qwen2", "max_position_embeddings").max_positions == 32768
    assert read("llama", "num_key_value_heads").shape.kv_groups == 4


# ---- warned of once


def test_what_goes_no_further_is_said_once(tmp_path: Path) -> None:
    config = {**BASE, "quantization_config": {"quant_method": "fp8"}, "auto_map": {"AutoConfig": "x.X"}}
    with pytest.warns(UserWarning, match="exports leave out quantization_config and auto_map") as caught:
        source = read_config(write_config(tmp_path, config)).source
        read_config(tmp_path)
    assert len(caught) == 1
    assert not {"quantization_config", "auto_map"} & source.keys()
