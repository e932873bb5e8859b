"""Building models on `meta`; they are filled afterwards from Hugging Face slices, trimmed shards or a seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any, cast

import torch

from ..layout import lookup
from ..parallel import Topology, mark_expert
from .config import ModelConfig, Recompute, config_of, rotary_frequencies, transformer_config
from .shards import named_shards
from .spec import Spec, block_spec

__all__ = ["build", "chunks_of", "evaluating", "rebuild"]


def chunks_of(model: Any) -> list[Any]:
    """Return the list of a model's chunks (more than one only with virtual pipeline stages)."""
    return list(model) if isinstance(model, Sequence) else [model]


def build(
    config: ModelConfig,
    topology: Topology,
    dtype: torch.dtype = torch.float32,
    *,
    recompute: Recompute = "none",
    spec: Spec = "local",
) -> list[Any]:
    """Build this rank's chunks of an mcore GPTModel, with every parameter on `meta`. Not collective.

    spec: layer spec; with `te`, the embedding and the output layer are on the GPU at once. Raises RecipeError where
    Transformer Engine is missing, TopologyError where the shape does not fit the layout.
    """
    mcore = transformer_config(config, topology, dtype, recompute=recompute, spec=spec)
    stages = topology.stages(config.shape.layers)
    chunks: list[Any] = []
    for virtual in range(topology.vp):
        at = virtual * topology.pp + topology.pp_rank
        shape = config.shape
        block = block_spec(config.norm, len(stages[at]), qk_norm=shape.qk_norm, experts=shape.experts, spec=spec)
        chunk = _gpt(
            mcore,
            block,
            vocab_size=config.shape.padded_vocab,
            max_sequence_length=config.max_positions,
            pre_process=at == 0,
            post_process=at == len(stages) - 1,
            share_embeddings_and_output_weights=config.shape.tied,
            position_embedding_type="rope",
            rotary_percent=config.rotary_share,
            vp_stage=virtual if topology.vp > 1 else None,
        )
        chunk.rotary_pos_emb.inv_freq = rotary_frequencies(config).to(topology.device)
        chunk.minitron = config
        chunks.append(chunk)
    return chunks


def rebuild(model: Any, config: ModelConfig, topology: Topology) -> list[Any]:
    """Build chunks on `meta` like those of `model` (any GPTModel), with the sizes of `config`. Not collective."""
    stages = topology.stages(config.shape.layers)
    chunks: list[Any] = []
    for virtual, old in enumerate(chunks_of(model)):
        at = virtual * topology.pp + topology.pp_rank
        spec = copy(old.decoder.submodules)
        spec.layer_specs = [spec.layer_specs[0]] * len(stages[at])
        chunk = _gpt(
            _resized(old.config, config, topology),
            spec,
            vocab_size=old.vocab_size,
            max_sequence_length=old.max_sequence_length,
            pre_process=old.pre_process,
            post_process=old.post_process,
            share_embeddings_and_output_weights=old.share_embeddings_and_output_weights,
            position_embedding_type=old.position_embedding_type,
            rotary_percent=old.rotary_percent,
            vp_stage=old.vp_stage,
        )
        chunk.rotary_pos_emb = old.rotary_pos_emb
        if getattr(old, "minitron", None) is not None:
            chunk.minitron = config
        chunks.append(chunk)
    return chunks


def _resized(mcore: Any, config: ModelConfig, topology: Topology) -> Any:
    """Return a copy of mcore's config with the sizes of `config`, and everything else unchanged."""
    from .config import check_fits, pipeline_layout

    check_fits(config.shape, topology)
    new, shape = copy(mcore), config.shape
    new.num_layers, new.hidden_size, new.ffn_hidden_size = shape.layers, shape.hidden, shape.ffn or shape.expert_ffn
    new.num_attention_heads, new.num_query_groups = shape.heads, shape.kv_groups
    if shape.experts:
        new.num_moe_experts, new.moe_ffn_hidden_size = shape.experts, shape.expert_ffn
        new.moe_shared_expert_intermediate_size = shape.shared_ffn or None
    new.pipeline_model_parallel_layout = pipeline_layout(shape.layers, topology)
    new.__post_init__()
    return new


def _gpt(mcore: Any, spec: Any, **arguments: Any) -> Any:
    """Build mcore's GPTModel on `meta`.

    The embedding group is set only afterwards: mcore would otherwise all-reduce a tied copy that has no data yet.
    """
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    embedding_group, groups.embd = groups.embd, None
    with torch.device("meta"):
        gpt = GPTModel(mcore, spec, pg_collection=groups, **arguments)
    gpt.pg_collection.embd = gpt.embd_group = embedding_group
    for name, parameter in gpt.named_parameters():
        if ".experts." in name:
            mark_expert(parameter)
    mark_parallel(gpt)
    return gpt


def mark_parallel(gpt: Any) -> None:
    """Set mcore's tensor-parallel attributes on parameters that lack them.

    Transformer Engine sets none on `meta` (module/linear.py, `reset_parameters`). By these attributes mcore sums
    gradients over tp and computes the gradient norm.
    """
    sizes = config_of(gpt).shape.sizes()
    for shard in named_shards(gpt):
        param, tensor = lookup(shard.name), cast(Any, shard.tensor)
        if "norm" in shard.name and not hasattr(tensor, "sequence_parallel"):
            tensor.sequence_parallel = gpt.config.sequence_parallel
        elif param.tp_dim is not None and not hasattr(tensor, "tensor_model_parallel"):
            tensor.tensor_model_parallel, tensor.partition_dim = True, param.tp_dim
            tensor.partition_stride = param.stride(sizes)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Run the model in eval mode without gradients.

    Eval mode also turns off mcore's activation recomputation, which would miscount layers that are left out.
    """
    was_training = [chunk.training for chunk in chunks_of(model)]
    try:
        for chunk in chunks_of(model):
            chunk.eval()
        with torch.no_grad():
            yield
    finally:
        for chunk, training in zip(chunks_of(model), was_training, strict=True):
            chunk.train(training)
