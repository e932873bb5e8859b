"""A Qwen2 with heads x head_dim != hidden is exported as a Llama; such a Llama is read back as the same model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_megatron.convert import check_folder, exported_config, folder_hash, load_hf, model_hash, read_config
from minitron_megatron.convert import save_hf as save
from minitron_megatron.convert.flat import with_family
from minitron_megatron.data import Batch
from minitron_megatron.errors import CheckpointError
from minitron_megatron.layout import Shape
from minitron_megatron.model import ModelConfig
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool

from .conftest import LLAMA3, make_folder
from .test_round_trip import logits_of_transformers, some_tokens, tensors_of

OUTPUT_BIAS = "model.layers.{}.self_attn.o_proj.bias"


def there_and_back(topology: Topology, source: Path, target: Path) -> tuple[bool, float]:
    """Return (whether the export has the model's hash, largest difference of transformers' logits from the model's)."""
    model = load_hf(source, topology)
    save(model, target, topology, architecture="auto", file_bytes=20_000)
    tokens = some_tokens(509)
    difference = check_folder(load_hf(target, topology), target, Batch(tokens, tokens, tokens >= 0), topology)
    back = load_hf(target, topology)
    save(back, target.with_name("back"), topology)
    same = model_hash(model, topology) == model_hash(back, topology) == folder_hash(target)
    return same, difference


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ({"tp": 2, "sequence_parallel": True}, {}),
        ({"pp": 2}, {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 500.0, **LLAMA3}}),
    ],
)
def test_a_qwen2_is_the_same_as_a_llama(pool: Pool, tmp_path: Path, layout: dict[str, Any], changes: dict) -> None:
    source, target = make_folder(tmp_path / "source", "qwen2", **changes), tmp_path / "out"
    for same, difference in pool.run(there_and_back, source, target, **layout):
        assert same and difference < 1e-4
    config = json.loads((target / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["LlamaForCausalLM"], "llama")
    assert (config["attention_bias"], config["mlp_bias"], config["head_dim"]) == (True, False, 16)
    assert config["eos_token_id"] is None, "transformers gives a Llama that does not say the end token 2"
    tokens = some_tokens(509)
    torch.testing.assert_close(
        logits_of_transformers(target, tokens), logits_of_transformers(source, tokens), atol=1e-5, rtol=1e-5
    )
    tensors, of_source = tensors_of(target), tensors_of(source)
    added = {name: tensor for name, tensor in tensors.items() if name not in of_source}
    assert sorted(added) == [OUTPUT_BIAS.format(layer) for layer in range(3)]
    assert all(tensor.shape == (40,) and not tensor.any() for tensor in added.values())
    assert tensors_of(target.with_name("back")).keys() == tensors.keys(), "it stays the Llama that it is"


@pytest.mark.parametrize(
    ("kind", "architecture", "changes"),
    [
        ("qwen2", "own", {}),
        ("qwen2", "auto", {"hidden_size": 64}),  # heads x head_dim: every client reads a Qwen2
        (
            "qwen2",
            "auto",
            {"hidden_size": 42},
        ),  # transformers 5 refuses such a Llama: hidden must be a multiple of the heads
        ("qwen3-tied", "auto", {}),
        ("qwen2_moe", "auto", {}),
        ("llama", "auto", {}),
    ],
)
def test_others_stay_what_they_are(tmp_path: Path, kind: str, architecture: Any, changes: dict[str, Any]) -> None:
    config = read_config(make_folder(tmp_path / "model", kind, **changes))
    assert exported_config(config, architecture) is config


def test_token_ids_go_along(tmp_path: Path) -> None:
    config = read_config(make_folder(tmp_path / "model", "qwen2", eos_token_id=[7, 8], bos_token_id=3))
    source = exported_config(config, "auto").source
    assert (source["eos_token_id"], source["bos_token_id"], source["pad_token_id"]) == ([7, 8], 3, None)


def without(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def not_zero(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name][-1] = -1e-30


def not_a_number(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name][0] = torch.nan


def too_short(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name][1:].clone()


def is_there(tensors: dict[str, torch.Tensor], name: str) -> None:
    assert name in tensors


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (not_zero, {}, "{name} is not zero, but this bias is not supported. Only a llama whose .* is zero in every"),
        (not_a_number, {}, "{name} is not zero"),
        (without, {}, "lacks the tensor {name}"),
        (too_short, {}, "{name} has shape \\(39,\\), but config.json makes it \\(40,\\)"),
        (is_there, {"attention_bias": False}, "holds a tensor that the model does not have: .*bias"),
        (is_there, {"mlp_bias": True}, "mlp_bias: True"),
        (is_there, {"attention_bias": 1}, "attention_bias: 1"),
    ],
)
def test_a_llama_with_other_biases_is_refused_by_name(
    tmp_path: Path, change: Callable[..., None], config: dict[str, Any], message: str
) -> None:
    folder, name = make_folder(tmp_path / "model", "llama", attention_bias=True), OUTPUT_BIAS.format(1)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(3):
        tensors[OUTPUT_BIAS.format(layer)].zero_()
    save_file(tensors, folder / "model.safetensors")
    assert len(folder_hash(folder)) == 64
    change(tensors, name)
    save_file(tensors, folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=message.format(name=name)):
        folder_hash(folder)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"norm": "LayerNorm"}, "norm='LayerNorm' would be read as 'RMSNorm'"),
        ({"activation": "relu2"}, "config.json says hidden_act: 'relu2', which is not supported; only 'silu' is"),
    ],
)
def test_a_model_of_no_family_names_the_setting(settings: dict[str, Any], said: str) -> None:
    shape = Shape(layers=4, hidden=32, ffn=48, heads=4, kv_groups=2, head_dim=8, vocab=432)
    with pytest.raises(CheckpointError) as caught:
        with_family(ModelConfig(shape, **settings))
    assert str(caught.value) == (
        f"a config.json of llama cannot express the model: {said}. Change the setting, or write the model in a format "
        "of your own."
    )
