"""Command-line flags with which Megatron-LM builds the model of one of our checkpoints.

Checked against Megatron-LM core_v0.16.1, core_v0.19.0 and 0.20 (megatron/training/checkpointing.py, arguments.py,
argument_utils.py). `load_args_from_checkpoint` takes most sizes from the checkpoint; the rest are flags here.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import CheckpointError
from .config import ModelConfig
from .megatron_names import FACTOR, LLAMA3, gpt_arguments, rotary_settings, transformer_settings

__all__ = ["FLAGS", "arguments_script", "check_megatron_lm", "megatron_lm_flags", "saved_arguments"]

FLAGS = "megatron-args.sh"
"""Bash file in the checkpoint's folder that sets the flags as an array."""

ACTIVATIONS = {(True, "silu"), (False, "relu2")}
"""Pairs (gated, activation) that flags can express: `--swiglu` and `--squared-relu`."""

RENAMED = {
    "gated_linear_unit": "swiglu",
    "num_moe_experts": "num_experts",
    "max_sequence_length": "max_position_embeddings",
}
"""mcore's name of a setting -> Megatron-LM's name of the argument, where they differ."""
NO_ARGUMENT = ("activation_func", "init_method_std", "share_embeddings_and_output_weights")
"""Settings that a checkpoint's arguments do not have under any name, or only in another form."""
ROUTING = {"moe_layer_freq": 1, "moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False}
"""Arguments of every model with experts."""


def check_megatron_lm(config: ModelConfig) -> None:
    """Raise CheckpointError, which names the setting, where Megatron-LM has no flag to express it."""
    scaling = dict(config.rotary_scaling or {})
    kind = scaling.get("rope_type", "default")
    if kind not in ("default", "llama3"):
        raise _inexpressible(f"rope_type {kind!r}", "its pretrain_gpt.py scales rotary embeddings only as llama3 does")
    for key, fixed in LLAMA3.items():
        if kind == "llama3" and scaling[key] != fixed:
            raise _inexpressible(f"{key}: {scaling[key]} of rope_type 'llama3'", f"it hard-codes {fixed:g}")
    if kind == "llama3" and scaling["factor"] != FACTOR:
        raise _inexpressible(
            f"factor: {scaling['factor']} of rope_type 'llama3'",
            f"its pretrain_gpt.py ignores --rope-scaling-factor and builds the model with {FACTOR:g}",
        )
    if (config.shape.gated, config.activation) not in ACTIVATIONS:
        gate = "with" if config.shape.gated else "without"
        raise _inexpressible(
            f"activation {config.activation} {gate} a gate", "its flags are --swiglu and --squared-relu"
        )


def _inexpressible(what: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"Megatron-LM cannot express {what}: {why}. Leave --format out for a Hugging Face folder, or build "
        "the model in your own script."
    )


def megatron_lm_flags(config: ModelConfig, dtype: torch.dtype, tokenizer: Path | None = None) -> list[tuple[str, ...]]:
    """Return every flag that Megatron-LM needs besides `--load`, each with its values.

    dtype: of the weights. tokenizer: the Hugging Face folder with the model's tokenizer. Raises CheckpointError where
    flags cannot express the model.
    """
    check_megatron_lm(config)
    shape, scaling = config.shape, dict(config.rotary_scaling or {})
    wanted = [
        (True, ("--use-checkpoint-args",)),
        (True, ("--exit-on-missing-checkpoint",)),
        (True, ("--ckpt-format", "torch_dist")),
        (True, ("--norm-epsilon", repr(config.norm_eps))),
        (config.zero_centered_norm, ("--apply-layernorm-1p",)),
        (shape.qk_norm, ("--qk-layernorm",)),
        (
            config.window is not None,
            ("--window-size", f"{(config.window or 1) - 1},0"),
        ),  # Megatron-LM's window excludes the token itself
        (bool(scaling), ("--use-rope-scaling",)),
        (shape.shared_gate, ("--moe-shared-expert-gate",)),
        (dtype == torch.bfloat16, ("--bf16",)),
        (dtype == torch.float16, ("--fp16",)),
        (tokenizer is not None, ("--tokenizer-type", "HuggingFaceTokenizer")),
        (tokenizer is not None, ("--tokenizer-model", str(tokenizer))),
    ]
    return [flag for holds, flag in wanted if holds]


def arguments_script(config: ModelConfig, dtype: torch.dtype, tokenizer: Path | None = None) -> str:
    """Return a bash file that sets `MEGATRON_ARGS` to all flags, beginning with `--load` of its own folder."""
    lines = [
        "# Flags with which Megatron-LM 0.16 or later loads this checkpoint:",
        f'#   source {FLAGS}; torchrun ... pretrain_gpt.py "${{MEGATRON_ARGS[@]}}" ...',
    ]
    flags = [" ".join(map(shlex.quote, flag)) for flag in megatron_lm_flags(config, dtype, tokenizer)]
    load = '--load "$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"'
    return "\n".join([*lines, "MEGATRON_ARGS=(", *(f"    {flag}" for flag in [load, *flags]), ")", ""])


def saved_arguments(config: ModelConfig, layout: Mapping[str, int], tokenizer: Path | None) -> dict[str, object]:
    """Return the checkpoint's `args` that Megatron-LM reads (training/checkpointing.py, `load_args_from_checkpoint`).

    layout: sizes of the model-parallel groups that write the checkpoint.
    """
    shape, rotary = config.shape, rotary_settings(config)
    settings = transformer_settings(config) | gpt_arguments(config)
    found = {RENAMED.get(name, name): value for name, value in settings.items() if name not in NO_ARGUMENT}
    return {
        **found,
        "seq_length": config.max_positions,
        "group_query_attention": shape.kv_groups != shape.heads,
        "add_position_embedding": False,
        "use_rotary_position_embeddings": True,
        "rotary_interleaved": False,
        "use_rope_scaling": rotary["rope_scaling"],
        "rope_scaling_factor": rotary.get("rope_scaling_factor", FACTOR),
        "squared_relu": config.activation == "relu2",
        "untie_embeddings_and_output_weights": not shape.tied,
        "norm_epsilon": config.norm_eps,
        "apply_layernorm_1p": config.zero_centered_norm,
        "apply_query_key_layer_scaling": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "padded_vocab_size": shape.padded_vocab,
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": str(tokenizer) if tokenizer else None,
        **layout,
        **(ROUTING if shape.experts else {}),
    }
