"""Store the matrices of a frozen model in float8."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..layout import layer_of, lookup
from ..model import Chunk, named_shards, overlay
from ..parallel import Topology, all_reduce

__all__ = ["is_packed", "pack_layers"]

FLOAT8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FLOAT8).max


def is_packed(name: str) -> bool:
    """Whether `pack_layers` packs this parameter."""
    return layer_of(name) is not None and "linear_" in name and name.endswith(".weight")


def pack_layers(chunks: Sequence[Chunk], topology: Topology) -> None:
    """Round the linear layers' weights of a frozen model to float8 (e4m3), one byte per weight, in place.

    Each output channel has a scale, computed over the whole matrix, so that the model is the same at every tp.
    A module's weights are widened while it runs. Routers, norms, embedding and output layer keep their dtype.
    Collective over tp.
    """
    for shard in list(named_shards(chunks)):
        if not is_packed(shard.name):
            continue
        weight = shard.tensor.detach()
        largest = weight.float().abs().amax(dim=1, keepdim=True)
        if lookup(shard.name).tp_dim == 1:
            all_reduce(largest, topology.tp_group, "max")
        scale = largest.clamp(min=torch.finfo(torch.float32).tiny) / LARGEST
        shard.module.weight = nn.Parameter((weight.float() / scale).to(FLOAT8), requires_grad=False)
        overlay(shard.module, partial(_widened, scale, weight.dtype))


def _widened(scale: Tensor, dtype: torch.dtype, packed: Tensor) -> Tensor:
    return (packed.float() * scale).to(dtype)
