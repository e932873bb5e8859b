"""A model as the checkpoint that Megatron-LM's training scripts load: `--load FOLDER --use-checkpoint-args`."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import PARTIAL, whole_file
from ..parallel import Topology, barrier, fail_together, save_sharded
from .build import chunks_of
from .config import ModelConfig, config_of
from .writing import writing

__all__ = ["save_megatron_lm"]

RELEASE = "release"
"""What Megatron-LM calls a checkpoint of weights without an optimizer, as its own converters write."""
TRACKER = "latest_checkpointed_iteration.txt"


def save_megatron_lm(model: Any, folder: str | Path, topology: Topology, *, tokenizer: Path | None = None) -> None:
    """Writes weights, and the arguments that build the model, in mcore's distributed format (`torch_dist`), which loads
    at any layout. Collective over the world.

    tokenizer: the Hugging Face folder that the arguments name. Raises CheckpointError where the folder exists or cannot
    be written.
    """
    folder, chunks = Path(folder), chunks_of(model)
    with _new(folder, topology) as partial:
        about: dict[str, Any] = {}
        sharded = {f"model{number}": chunk.sharded_state_dict(metadata=about) for number, chunk in enumerate(chunks)}
        sharded = sharded if len(chunks) > 1 else {"model": sharded["model0"]}
        arguments = Namespace(**_arguments(config_of(chunks[0]), topology, tokenizer))
        state = {"args": arguments, "checkpoint_version": 3.0, "iteration": 0, **sharded}
        with writing(str(folder), "Make room, or give another folder."):
            save_sharded(state, partial / RELEASE)
        if topology.rank == 0:
            with whole_file(partial / TRACKER) as file:
                file.write_text(RELEASE, encoding="utf-8")


@contextmanager
def _new(folder: Path, topology: Topology) -> Iterator[Path]:
    """A folder that all ranks fill, and that is there whole or not at all. Collective."""
    with fail_together():
        if folder.exists() and any(folder.iterdir()):
            raise CheckpointError(f"{folder} is not empty. Give another folder.")
    partial = folder.with_name(folder.name + PARTIAL)
    if topology.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / RELEASE).mkdir(parents=True)
    barrier()
    yield partial
    barrier()
    if topology.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    barrier()


def _arguments(config: ModelConfig, topology: Topology, tokenizer: Path | None) -> dict[str, Any]:
    """What Megatron-LM reads of a checkpoint's `args` (training/checkpointing.py, `load_args_from_checkpoint`)."""
    shape, scaling = config.shape, dict(config.rotary_scaling or {})
    found = {
        "num_layers": shape.layers,
        "hidden_size": shape.hidden,
        "ffn_hidden_size": shape.ffn or shape.expert_ffn,
        "seq_length": config.max_positions,
        "max_position_embeddings": config.max_positions,
        "num_attention_heads": shape.heads,
        "group_query_attention": shape.kv_groups != shape.heads,
        "num_query_groups": shape.kv_groups,
        "kv_channels": shape.head_dim,
        "position_embedding_type": "rope",
        "add_position_embedding": False,
        "use_rotary_position_embeddings": True,
        "rotary_base": config.rotary_base,
        "rotary_percent": config.rotary_share,
        "rotary_interleaved": False,
        "use_rope_scaling": scaling.get("rope_type") == "llama3",
        "rope_scaling_factor": scaling.get("factor", 8.0),
        "add_bias_linear": False,
        "add_qkv_bias": shape.qkv_bias,
        "qk_layernorm": shape.qk_norm,
        "swiglu": shape.gated,
        "squared_relu": config.activation == "relu2",
        "untie_embeddings_and_output_weights": not shape.tied,
        "normalization": config.norm,
        "norm_epsilon": config.norm_eps,
        "apply_layernorm_1p": config.zero_centered_norm,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "vocab_size": shape.vocab,
        "padded_vocab_size": shape.padded_vocab,
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": str(tokenizer) if tokenizer else None,
        "tensor_model_parallel_size": topology.tp,
        "pipeline_model_parallel_size": topology.pp,
        "expert_model_parallel_size": topology.ep,
    }
    if shape.experts:
        found |= {
            "num_experts": shape.experts,
            "moe_router_topk": shape.experts_per_token,
            "moe_ffn_hidden_size": shape.expert_ffn,
            "moe_shared_expert_intermediate_size": shape.shared_ffn or None,
            "moe_shared_expert_gate": shape.shared_gate,
            "moe_router_pre_softmax": config.router_pre_softmax,
        }
    return found
