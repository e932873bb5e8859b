"""Building models on `meta`; they are filled afterwards from Hugging Face slices, trimmed shards or a seed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

import torch

from ..layout import Shape, lookup
from ..parallel import Topology, mark_expert
from .chunk import Chunk, Model, chunks_of
from .config import ModelConfig, Recompute, check_fits, pipeline_layout, rotary_frequencies
from .megatron_names import ARGUMENTS, POSITIONS, gpt_arguments, shape_of, shape_settings, transformer_settings
from .shards import named_shards
from .spec import Spec, block_spec

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = ["build", "evaluating", "fused_swiglu", "rebuild"]

PLACEMENT = ("pre_process", "post_process", "parallel_output", "fp16_lm_cross_entropy", "vp_stage")
REBUILT = (*ARGUMENTS, *POSITIONS, *PLACEMENT)
"""Arguments of a GPTModel that `rebuild` copies; it has attributes of the same names."""


def build(
    config: ModelConfig,
    topology: Topology,
    dtype: torch.dtype = torch.float32,
    *,
    recompute: Recompute = "none",
    spec: Spec = "local",
) -> list[Chunk]:
    """Build this rank's chunks of an mcore GPTModel, with every parameter on `meta`. Not collective.

    spec: layer spec; with `te`, the embedding and the output layer are on the GPU at once. Raises RecipeError where
    Transformer Engine is missing, TopologyError where the shape does not fit the layout.
    """
    mcore = transformer_config(config, topology, dtype, recompute=recompute, spec=spec)
    stages = topology.stages(config.shape.layers)
    chunks: list[Chunk] = []
    for virtual in range(topology.vp):
        at = virtual * topology.pp + topology.pp_rank
        shape = config.shape
        block = block_spec(config.norm, len(stages[at]), qk_norm=shape.qk_norm, experts=shape.experts, spec=spec)
        chunk = _gpt(
            mcore,
            block,
            **gpt_arguments(config) | {"vocab_size": shape.padded_vocab},
            pre_process=at == 0,
            post_process=at == len(stages) - 1,
            vp_stage=virtual if topology.vp > 1 else None,
        )
        chunk.rotary_pos_emb.inv_freq = rotary_frequencies(config).to(topology.device)
        chunk.minitron = config
        chunks.append(chunk)
    return chunks


def transformer_config(
    config: ModelConfig, topology: Topology, dtype: torch.dtype, *, recompute: Recompute, spec: Spec
) -> TransformerConfig:
    """Return mcore's config for this model at this layout, with parameters of `dtype`.

    Raises TopologyError where the shape does not fit the layout.
    """
    from megatron.core.transformer.transformer_config import TransformerConfig

    shape = config.shape
    check_fits(shape, topology)
    return TransformerConfig(
        **transformer_settings(config),
        **(_expert_execution(topology) if shape.experts else {}),
        **_recomputed(recompute, shape),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=topology.tp,
        pipeline_model_parallel_size=topology.pp,
        virtual_pipeline_model_parallel_size=topology.vp if topology.vp > 1 else None,
        pipeline_model_parallel_layout=pipeline_layout(shape.layers, topology),
        sequence_parallel=topology.sequence_parallel,
        # interleaved over two stages, both neighbours are the same rank, and batched sends arrive in the wrong order
        overlap_p2p_comm=topology.vp > 1,
        batch_p2p_comm=topology.vp == 1,
        calculate_per_token_loss=True,
        use_cpu_initialization=spec == "local",  # passes no device, so that torch.device("meta") applies
        init_model_with_meta_device=spec == "te",  # TE's modules pass a device; only this key selects `meta`
        perform_initialization=True,  # sets the tensor-parallel attributes of parameters
        init_method=_as_it_is,
        output_layer_init_method=_as_it_is,
        embedding_init_method=_as_it_is,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        # SwiGLU by torch.compile, one kernel each way, which saves two tensors less of the MLP's width
        bias_activation_fusion=config.activation == "silu" and shape.gated and topology.device.type == "cuda",
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
    )


def fused_swiglu() -> ModuleType:
    """Return mcore's module whose functions compute SwiGLU where `bias_activation_fusion` is on."""
    from megatron.core.fusions import fused_bias_swiglu

    return fused_bias_swiglu


def _as_it_is(weight: torch.Tensor) -> torch.Tensor:
    """Leave a weight uninitialised: it is on `meta` and is filled later, and torch's own draw is slow there."""
    return weight


def _recomputed(recompute: Recompute, shape: Shape) -> dict[str, object]:
    """Return mcore's recomputation keys.

    mcore's own `selective` recomputes the core attention, for which flash attention stores little anyway; ours
    recomputes the MLP or MoE.
    """
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["moe" if shape.experts else "mlp"]}
    return {}


def _expert_execution(topology: Topology) -> dict[str, object]:
    """Return how mcore distributes experts: no auxiliary loss, no token dropping."""
    return {
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall" if topology.device.type == "cuda" else "allgather",  # CUDA streams
        "expert_model_parallel_size": topology.ep,
        "expert_tensor_parallel_size": 1,
    }


def rebuild(model: Model, shape: Shape, topology: Topology) -> list[Chunk]:
    """Build chunks on `meta` like those of `model` (any GPTModel), with the sizes of `shape`. Not collective."""
    stages = topology.stages(shape.layers)
    chunks: list[Chunk] = []
    for virtual, old in enumerate(chunks_of(model)):
        at = virtual * topology.pp + topology.pp_rank
        spec = copy(old.decoder.submodules)
        spec.layer_specs = [spec.layer_specs[0]] * len(stages[at])
        arguments = {name: getattr(old, name) for name in REBUILT}
        chunk = _gpt(_resized(old.config, shape, topology), spec, rope_scaling=old.rotary_scaling, **arguments)
        chunk.rotary_pos_emb = old.rotary_pos_emb
        if getattr(old, "minitron", None) is not None:
            chunk.minitron = replace(old.minitron, shape=shape)
        chunks.append(chunk)
    return chunks


def _resized(mcore: TransformerConfig, shape: Shape, topology: Topology) -> TransformerConfig:
    """Return a copy of mcore's config with the sizes of `shape`, and everything else unchanged."""
    check_fits(shape, topology)
    new = copy(mcore)
    for name, value in shape_settings(shape).items():
        setattr(new, name, value)
    new.pipeline_model_parallel_layout = pipeline_layout(shape.layers, topology)
    new.__post_init__()
    return new


def _gpt(mcore: TransformerConfig, spec: TransformerBlockSubmodules, **arguments: object) -> Chunk:
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


def mark_parallel(gpt: Chunk) -> None:
    """Set mcore's tensor-parallel attributes on parameters that lack them.

    Transformer Engine sets none on `meta` (module/linear.py, `reset_parameters`). By these attributes mcore sums
    gradients over tp and computes the gradient norm.
    """
    sizes = shape_of(gpt).sizes()
    for shard in named_shards(gpt):
        param, tensor = lookup(shard.name), cast(Any, shard.tensor)
        if "norm" in shard.name and not hasattr(tensor, "sequence_parallel"):
            tensor.sequence_parallel = gpt.config.sequence_parallel
        elif param.tp_dim is not None and not hasattr(tensor, "tensor_model_parallel"):
            tensor.tensor_model_parallel, tensor.partition_dim = True, param.tp_dim
            tensor.partition_stride = param.stride(sizes)


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
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
