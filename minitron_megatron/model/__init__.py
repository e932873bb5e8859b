"""Megatron-Core models: built on `meta` from a config, filled shard by shard under global names, run by mcore's
pipeline schedules, saved as checkpoints.

Knows: mcore's modules, configs and schedules, training checkpoints. Must not know: Hugging Face files, scores, losses.
"""

from .build import build, chunks_of, evaluating, rebuild
from .checkpoint import Checkpoints, Trainee, load_checkpoint, load_weights
from .config import ACTIVATIONS, ModelConfig, Recompute, check_fits, config_of
from .finite import check_finite
from .initial import fill_initial
from .kv_cache import DecodeBatch, KVCache
from .layers import FUSED_NORM, Arguments, fused_norm, layer_arguments, layers_of, run_layer
from .megatron_flags import FLAGS as MEGATRON_FLAGS
from .megatron_flags import check_megatron_lm
from .megatron_lm import save_megatron_lm
from .schedule import MicroBatch, States, forward_backward, forward_kept, forward_only, forward_rest, windows
from .shards import BRIDGE, LORA, NamedShard, assign, named_shards, output_weight, overlay, owner_rank
from .spec import Spec, check_spec, reads_past

__all__ = [
    "ACTIVATIONS",
    "BRIDGE",
    "FUSED_NORM",
    "LORA",
    "MEGATRON_FLAGS",
    "Arguments",
    "Checkpoints",
    "DecodeBatch",
    "KVCache",
    "MicroBatch",
    "ModelConfig",
    "NamedShard",
    "Recompute",
    "Spec",
    "States",
    "Trainee",
    "assign",
    "build",
    "check_finite",
    "check_fits",
    "check_megatron_lm",
    "check_spec",
    "chunks_of",
    "config_of",
    "evaluating",
    "fill_initial",
    "forward_backward",
    "forward_kept",
    "forward_only",
    "forward_rest",
    "fused_norm",
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
    "run_layer",
    "save_megatron_lm",
    "windows",
]
