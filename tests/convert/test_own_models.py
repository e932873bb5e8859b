"""A GPTModel that was built elsewhere is exported as a family that computes the same, or refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from minitron_megatron.convert import check_folder, save_hf
from minitron_megatron.data import Batch
from minitron_megatron.errors import MinitronError
from minitron_megatron.layout import Shape
from minitron_megatron.model import ModelConfig, build, fill_initial
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool

SHAPE = Shape(layers=2, hidden=32, ffn=48, heads=4, kv_groups=2, head_dim=8, vocab=128)
EXPERTS = replace(SHAPE, ffn=0, experts=4, experts_per_token=2, expert_ffn=24)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 5.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
NEMOTRON: dict[str, Any] = {
    "norm": "LayerNorm",
    "zero_centered_norm": True,
    "activation": "relu2",
    "rotary_share": 0.5,
}

FAMILIES = {
    "llama": ModelConfig(replace(SHAPE, tied=True), rotary_base=5e5, rotary_scaling=LLAMA3),
    "qwen2": ModelConfig(replace(SHAPE, qkv_bias=True), norm_eps=1e-6),
    "qwen3": ModelConfig(replace(SHAPE, qk_norm=True), rotary_scaling={"rope_type": "linear", "factor": 2.0}),
    "mistral": ModelConfig(SHAPE, window=5),
    "phi3": ModelConfig(SHAPE, rotary_share=0.5),
    "mixtral": ModelConfig(EXPERTS),
    "qwen2_moe": ModelConfig(replace(EXPERTS, qkv_bias=True, shared_ffn=16, shared_gate=True), router_pre_softmax=True),
    "qwen3_moe": ModelConfig(replace(EXPERTS, qk_norm=True)),
    "nemotron": ModelConfig(replace(SHAPE, gated=False, norm_bias=True), **NEMOTRON),
}
REFUSED = {
    "activation_func=gelu": (ModelConfig(SHAPE), {"activation_func": F.gelu}),
    "softmax_scale=0.5": (ModelConfig(SHAPE), {"softmax_scale": 0.5}),
    "hidden_act: 'relu2'": (ModelConfig(SHAPE, activation="relu2"), {}),
    "gated=False": (ModelConfig(replace(SHAPE, gated=False)), {}),
    "zero_centered_norm=True": (ModelConfig(SHAPE, zero_centered_norm=True), {}),
    "hidden_act: 'silu'": (ModelConfig(replace(SHAPE, norm_bias=True), norm="LayerNorm"), {}),
    "shared_ffn=16": (ModelConfig(replace(EXPERTS, shared_ffn=16)), {}),
}
"""Word of the message -> a config, and settings of the TransformerConfig that differ from it."""


def export(topology: Topology, config: ModelConfig, settings: dict[str, Any], folder: Path) -> float:
    """Export a model whose config is known from its GPTModel alone; return the difference to transformers."""
    [model] = build(replace(config, init_std=0.2), topology)
    fill_initial(model, topology, 1)
    del model.minitron
    for name, value in settings.items():
        setattr(model.config, name, value)
    save_hf(model, folder, topology)
    tokens = torch.arange(2, 42).view(2, 20)
    return check_folder(model, folder, Batch(tokens, tokens, tokens >= 0), topology)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_exported_as_the_family_that_computes_the_same(pool: Pool, family: str, tmp_path: Path) -> None:
    [difference] = pool.run(export, FAMILIES[family], {}, tmp_path / "out")
    assert difference < 1e-4
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == family


@pytest.mark.parametrize("word", REFUSED)
def test_what_no_family_computes_is_refused_by_name(pool: Pool, word: str, tmp_path: Path) -> None:
    config, settings = REFUSED[word]
    with pytest.raises(MinitronError) as caught:
        pool.run(export, config, settings, tmp_path / "out")
    assert word in str(caught.value)
    assert not list(tmp_path.iterdir())
