"""Every parameter of a rank under its global name, and the one way to put a tensor in its place."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..layout import Shape, layer_of
from ..parallel import Topology

__all__ = ["NamedShard", "adopt", "home_stage", "named_shards", "output_weight"]

EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class NamedShard:
    """This rank's piece of one parameter."""

    name: str
    """Global: layers numbered over the whole model; a tied output layer bears the embedding's name."""
    module: nn.Module
    leaf: str
    second_home: bool = False
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
            second = tied and local == OUTPUT
            yield NamedShard(EMBEDDING if second else _global(local, gpt), gpt.get_submodule(path), leaf, second)


def _global(local: str, gpt: Any) -> str:
    found = re.match(r"decoder\.layers\.(\d+)\.", local)
    if not found:
        return local
    layer = gpt.decoder.layers[int(found[1])].layer_number - 1
    return f"decoder.layers.{layer}.{local[found.end() :]}"


def output_weight(chunk: Any) -> Tensor:
    """The last stage's output layer: [vocab held, hidden], on this rank the embedding itself where the two are tied."""
    return (
        chunk.shared_embedding_or_output_weight()
        if chunk.share_embeddings_and_output_weights
        else chunk.output_layer.weight
    )


def home_stage(name: str, shape: Shape, topology: Topology) -> int:
    """The pipeline rank that holds a parameter (of a tied embedding: the first home)."""
    layer = layer_of(name)
    if layer is None:
        return 0 if name == EMBEDDING else topology.pp - 1
    return topology.stage_of(layer, shape.layers)


def adopt(shard: NamedShard, tensor: Tensor) -> None:
    """Puts `tensor` in the place of a parameter, which may be on `meta`; mcore's marks on it are kept.

    Raises ValueError where the shapes differ.
    """
    old = shard.tensor
    if old.shape != tensor.shape:
        raise ValueError(f"{shard.name} has shape {tuple(old.shape)} here and was given {tuple(tensor.shape)}")
    new = nn.Parameter(tensor.detach(), requires_grad=old.requires_grad)
    new.__dict__.update(old.__dict__)
    setattr(shard.module, shard.leaf, new)
