"""Every parameter of a rank under its global name, and the one way to put a tensor in its place."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..layout import Shape, expert_of, layer_of
from ..parallel import Topology

__all__ = ["BRIDGE", "LORA", "NamedShard", "assign", "named_shards", "output_weight", "overlay", "owner_rank"]

FUSED_NORMS = {"self_attention.linear_qkv": "input_layernorm", "mlp.linear_fc1": "pre_mlp_layernorm"}
"""Transformer Engine's linear layers that hold the norm before them, as `layer_norm_weight` and `layer_norm_bias`."""

BRIDGE, LORA = "bridge", "lora"
"""The attributes of a chunk for what training alone needs: its parameters train and are saved, and are none of the
model's."""

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class NamedShard:
    """This rank's piece of one parameter."""

    name: str
    """Global: layers numbered over the whole model; a tied output layer bears the embedding's name."""
    module: nn.Module
    leaf: str
    tied_copy: bool = False
    """Whether this is the last stage's copy of a tied embedding."""

    @property
    def tensor(self) -> nn.Parameter:
        return getattr(self.module, self.leaf)


def named_shards(model: nn.Module | Sequence[nn.Module]) -> Iterator[NamedShard]:
    """This rank's shards of an mcore GPTModel, or of its chunks, in the modules' order."""
    for chunk in model if isinstance(model, Sequence) else [model]:
        gpt: Any = chunk
        tied = gpt.share_embeddings_and_output_weights
        for local, _ in gpt.named_parameters():
            path, _, leaf = local.rpartition(".")
            if path.split(".")[0] in (BRIDGE, LORA):
                continue
            second = tied and local == OUTPUT
            yield NamedShard(EMBEDDING if second else _global(local, gpt), gpt.get_submodule(path), leaf, second)


def _global(local: str, gpt: Any) -> str:
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
    """A parameter's name inside its layer as mcore's local spec has it, from Transformer Engine's."""
    for module, norm in FUSED_NORMS.items():
        name = re.sub(rf"^{module}\.layer_norm_(weight|bias)$", rf"{norm}.\1", name)
    return re.sub(r"^mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$", r"mlp.experts.local_experts.\3.\1.\2", name)


def output_weight(chunk: Any) -> Tensor:
    """The last stage's output layer: [vocab held, hidden], on this rank the embedding itself where the two are tied."""
    return (
        chunk.shared_embedding_or_output_weight()
        if chunk.share_embeddings_and_output_weights
        else chunk.output_layer.weight
    )


def owner_rank(
    name: str, shape: Shape, topology: Topology, tp_rank: int | None = None, replica: int | None = None
) -> int:
    """The global rank that holds a parameter's shard (of a tied embedding: the first home).

    tp_rank: of which shard; replica: on which data-parallel rank, of an expert's parameter on which of the ranks that
    hold the same experts. By default this rank's own.
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
    """Puts `tensor` in the place of a parameter, which may be on `meta`; mcore's marks on it are kept.

    Raises ValueError where the shapes differ.
    """
    old = shard.tensor
    if old.shape != tensor.shape:
        raise ValueError(f"{shard.name} has shape {tuple(old.shape)} here and was given {tuple(tensor.shape)}")
    new = nn.Parameter(tensor.detach(), requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    setattr(shard.module, shard.leaf, new)


def overlay(module: Any, weight_of: Callable[[Tensor], Tensor]) -> list[Any]:
    """Has a module compute with `weight_of(its weight)` whenever it runs; the handles to take that away.

    An attribute of an object comes before a parameter of its name.
    """

    def lay(module: Any, inputs: Any) -> None:
        module.__dict__["weight"] = weight_of(module._parameters["weight"])

    def lift(module: Any, inputs: Any, output: Any) -> None:
        del module.__dict__["weight"]

    return [module.register_forward_pre_hook(lay), module.register_forward_hook(lift)]
