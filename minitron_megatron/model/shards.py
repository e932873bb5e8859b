"""Parameters of a rank under their global names, and assignment of new tensors to them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..layout import Shape, expert_of, layer_of
from ..parallel import Topology
from .chunk import Chunk, Model, chunks_of

__all__ = ["BRIDGE", "LORA", "NamedShard", "assign", "named_shards", "output_weight", "overlay", "owner_rank"]

FUSED_NORMS = {"self_attention.linear_qkv": "input_layernorm", "mlp.linear_fc1": "pre_mlp_layernorm"}
"""Transformer Engine's linear layer -> the norm that is fused into it, as `layer_norm_weight` and `layer_norm_bias`."""

BRIDGE, LORA = "bridge", "lora"
"""Attributes of a chunk that exist only for training: their parameters are trained and saved, but are not part of the
model."""

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class NamedShard:
    """Shard of one parameter on this rank."""

    name: str
    """Global name: layers numbered over the whole model; a tied output layer has the embedding's name."""
    module: nn.Module
    leaf: str
    tied_copy: bool = False
    """Whether this is the copy of a tied embedding on the last stage."""

    @property
    def tensor(self) -> nn.Parameter:
        return getattr(self.module, self.leaf)


def named_shards(model: Model) -> Iterator[NamedShard]:
    """Yield this rank's shards of an mcore GPTModel, or of its chunks, in the order of the modules."""
    for gpt in chunks_of(model):
        tied = gpt.share_embeddings_and_output_weights
        for local, _ in gpt.named_parameters():
            path, _, leaf = local.rpartition(".")
            if path.split(".")[0] in (BRIDGE, LORA):
                continue
            tied_copy = tied and local == OUTPUT
            name = EMBEDDING if tied_copy else _global(local, gpt)
            yield NamedShard(name, gpt.get_submodule(path), leaf, tied_copy)


def _global(local: str, gpt: Chunk) -> str:
    found = re.match(r"decoder\.layers\.(\d+)\.", local)
    if not found:
        return local
    layer = gpt.decoder.layers[int(found[1])]
    rest = _canonical(local[found.end() :])
    expert = expert_of(f".{rest}")
    if expert is not None:
        rest = rest.replace(f".{expert}.", f".{expert + layer.mlp.local_expert_indices[0]}.", 1)
    return f"decoder.layers.{layer.layer_number - 1}.{rest}"


def _canonical(name: str) -> str:
    """Translate a parameter's name inside its layer from Transformer Engine's spec to mcore's local spec."""
    for module, norm in FUSED_NORMS.items():
        name = re.sub(rf"^{module}\.layer_norm_(weight|bias)$", rf"{norm}.\1", name)
    return re.sub(r"^mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$", r"mlp.experts.local_experts.\3.\1.\2", name)


def output_weight(chunk: Chunk) -> Tensor:
    """Return the output weight of the last stage, which may be the tied embedding: [held vocabulary rows, hidden]."""
    return (
        chunk.shared_embedding_or_output_weight()
        if chunk.share_embeddings_and_output_weights
        else chunk.output_layer.weight
    )


def owner_rank(
    name: str, shape: Shape, topology: Topology, tp_rank: int | None = None, replica: int | None = None
) -> int:
    """Return the global rank that holds a parameter's shard (for a tied embedding: the one on the first stage).

    tp_rank: the tensor-parallel shard. replica: the data-parallel rank, or for an expert's parameter the rank among
    those that hold the same experts. Both default to this rank's own.
    """
    layer, expert = layer_of(name), expert_of(name)
    if layer is None:
        stage = 0 if name == EMBEDDING else topology.pp - 1
    else:
        stage = topology.stage_of(layer, shape.layers)
    if expert is not None:
        ep_rank = expert * topology.ep // shape.experts
        return topology.rank_of_expert(stage, ep_rank, topology.edp_rank if replica is None else replica)
    return topology.rank_at(
        stage,
        topology.tp_rank if tp_rank is None else tp_rank,
        topology.dp_rank if replica is None else replica,
    )


def assign(shard: NamedShard, tensor: Tensor) -> None:
    """Replace a parameter, which may be on `meta`, by `tensor`; mcore's attributes on it are kept.

    Raises ValueError where the shapes differ.
    """
    old = shard.tensor
    if old.shape != tensor.shape:
        raise ValueError(f"{shard.name} has shape {tuple(old.shape)}, but the new tensor has {tuple(tensor.shape)}")
    new = nn.Parameter(tensor.detach(), requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    setattr(shard.module, shard.leaf, new)


def overlay(module: nn.Module, weight_of: Callable[[Tensor], Tensor]) -> list[RemovableHandle]:
    """Make a module compute with `weight_of(its weight)` in each forward pass; return the hook handles, to undo it.

    An instance attribute takes precedence over a parameter of the same name.
    """

    def set_weight(module: nn.Module, inputs: object) -> None:
        weight = module._parameters["weight"]
        assert weight is not None
        module.__dict__["weight"] = weight_of(weight)

    def restore_weight(module: nn.Module, inputs: object, output: object) -> None:
        del module.__dict__["weight"]

    return [module.register_forward_pre_hook(set_weight), module.register_forward_hook(restore_weight)]
