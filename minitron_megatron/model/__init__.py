"""Megatron-Core models: built on `meta` from a config, filled shard by shard under global names, run by mcore's
pipeline schedules, saved as checkpoints.

Knows: mcore's modules, configs and schedules, training checkpoints. Must not know: Hugging Face files, scores, losses.
"""

from .build import build, evaluating, fused_swiglu, rebuild
from .checkpoint import Checkpoints, CheckpointState, Trainee, load_checkpoint, load_weights
from .chunk import Chunk, Model, WrappedChunk, chunks_of
from .config import HfConfig, ModelConfig, Recompute, activation_name, check_fits
from .finite import are_finite, check_finite
from .initial import fill_initial
from .kv_cache import DecodeBatch, KVCache
from .layers import FUSED_NORM, Arguments, fused_norm, layer_arguments, layers_of, run_layer
from .megatron_checkpoint import MegatronCheckpoint, is_megatron_checkpoint
from .megatron_flags import FLAGS as MEGATRON_FLAGS
from .megatron_flags import check_megatron_lm
from .megatron_lm import save_megatron_lm
from .megatron_names import (
    SHAPE_NAMES,
    field_of,
    gpt_arguments,
    is_execution_setting,
    rotary_settings,
    shape_of,
    transformer_settings,
)
from .read_model import changed_settings, config_of
from .schedule import MicroBatch, States, forward_backward, forward_kept, forward_only, forward_rest, windows
from .shards import BRIDGE, LORA, NamedShard, assign, named_shards, output_weight, overlay, owner_rank
from .spec import Spec, check_spec, reads_past

__all__ = [
    "BRIDGE",
    "FUSED_NORM",
    "LORA",
    "MEGATRON_FLAGS",
    "SHAPE_NAMES",
    "Arguments",
    "CheckpointState",
    "Checkpoints",
    "Chunk",
    "DecodeBatch",
    "HfConfig",
    "KVCache",
    "MegatronCheckpoint",
    "MicroBatch",
    "Model",
    "ModelConfig",
    "NamedShard",
    "Recompute",
    "Spec",
    "States",
    "Trainee",
    "WrappedChunk",
    "activation_name",
    "are_finite",
    "assign",
    "build",
    "changed_settings",
    "check_finite",
    "check_fits",
    "check_megatron_lm",
    "check_spec",
    "chunks_of",
    "config_of",
    "evaluating",
    "field_of",
    "fill_initial",
    "forward_backward",
    "forward_kept",
    "forward_only",
    "forward_rest",
    "fused_norm",
    "fused_swiglu",
    "gpt_arguments",
    "is_execution_setting",
    "is_megatron_checkpoint",
    "layer_arguments",
    "layers_of",
    "load_checkpoint",
    "load_weights",
    "named_shards",
    "output_weight",
    "overlay",
    "owner_rank",
    "reads_past",
    "rebuild",
    "rotary_settings",
    "run_layer",
    "save_megatron_lm",
    "shape_of",
    "transformer_settings",
    "windows",
]
