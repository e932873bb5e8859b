"""Fixtures: tiny Hugging Face folders of every family, made by transformers itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

HALF_ROTATED = {"rope_theta": 1000.0, "rope_type": "default", "partial_rotary_factor": 0.5}

MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")

KINDS: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": {"rope_theta": 500.0, **LLAMA3}},
    "llama-tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None, "rope_parameters": {"rope_theta": 1000.0, "rope_type": "default"}},
    "mistral-tied": {"sliding_window": None, "tie_word_embeddings": True},
    "qwen2": {},
    "qwen3-tied": {"tie_word_embeddings": True, "rope_parameters": {"rope_theta": 1000.0, "rope_type": "default"}},
    "nemotron": {"norm_eps": 1e-5, "rope_parameters": HALF_ROTATED},
    "phi3": {"sliding_window": None, "resid_pdrop": 0.0, "original_max_position_embeddings": 64},
    "phi3-tied": {"tie_word_embeddings": True, "rope_parameters": HALF_ROTATED},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen2_moe": {**MIXTURE, "shared_expert_intermediate_size": 12},
    "qwen3_moe": {**MIXTURE, "norm_topk_prob": True},
}
"""Kind -> config keys besides SIZES; the kind's first word is the family."""

SIZES = {
    "vocab_size": 509,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "pad_token_id": None,
}


def make_folder(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """Write a model with save_pretrained; its random weights are large enough to affect the logits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**SIZES, **KINDS[kind], **changes}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind.split("-")[0], **settings))
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape) * 0.2 + (1.0 if weight.dim() == 1 else 0.0))
    model.to(dtype).save_pretrained(folder)
    return folder


RENAMED = (
    ("model.layers.", "trunk.blocks."),
    ("model.embed_tokens", "trunk.embed"),
    ("model.norm", "trunk.norm"),
    ("self_attn", "attention"),
    ("_proj", ""),
    ("input_layernorm", "norm_1"),
    ("post_attention_layernorm", "norm_2"),
    ("lm_head", "head"),
)


def renamed(name: str) -> str:
    """Return the name of a Llama's tensor (or pattern) in a family that transformers does not know."""
    for llama_name, new_name in RENAMED:
        name = name.replace(llama_name, new_name)
    return name


def make_renamed(folder: Path, llama: Path) -> Path:
    """Rewrite a Llama's folder as a folder of that family, `ours`."""
    folder.mkdir()
    tensors = load_file(llama / "model.safetensors")
    save_file({renamed(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((llama / "config.json").read_text())
    config |= {"model_type": "ours", "architectures": ["OursForCausalLM"]}
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_ours.OursForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function kind -> folder; each folder is made once."""
    root = tmp_path_factory.mktemp("hf")

    def folder(kind: str) -> Path:
        path = root / kind
        return path if path.is_dir() else make_folder(path, kind)

    return folder
