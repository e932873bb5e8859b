"""Random initial weights that depend on a seed and the parameter's name, never on the layout."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from ..layout import Shape, lookup
from ..parallel import Topology
from .chunk import Model, chunks_of
from .megatron_names import field_of, shape_of
from .shards import assign, named_shards

__all__ = ["fill_initial"]

RESIDUAL = ("linear_proj.weight", "linear_fc2.weight")
"""Weights whose output is added to the residual stream: their std is divided by sqrt(2 layers), as in GPT-2 and
Megatron-LM."""


def fill_initial(model: Model, topology: Topology, seed: int) -> None:
    """Fill every parameter of `model` (on `meta`) with random values, the same global ones at every layout."""
    first = chunks_of(model)[0]
    shape, std, norm = shape_of(first), field_of(first, "init_std"), 1.0 - field_of(first, "zero_centered_norm")
    for shard in named_shards(model):
        full = _draw(shard.name, shape, seed, std, norm)
        param, sizes = lookup(shard.name), shape.sizes()
        for dim in range(full.dim()):
            full = full.index_select(dim, param.shard_rows(dim, sizes, topology.tp_rank, topology.tp))
        assign(shard, full.to(topology.device, shard.tensor.dtype))


def _draw(name: str, shape: Shape, seed: int, std: float, norm: float) -> Tensor:
    """Return the unsharded fp32 tensor of a parameter: `norm` for norms, zero for biases and vocabulary padding."""
    param = lookup(name)
    size = param.shape(shape.sizes(padded=False))
    if "norm" in name or name.endswith("bias"):
        return torch.full(size, norm if name.endswith("weight") else 0.0)
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:7]))
    if name.endswith(RESIDUAL):
        std /= math.sqrt(2 * shape.layers)
    full = torch.randn(size, generator=generator) * std
    padding = param.shape(shape.sizes())[0] - size[0]
    return torch.cat([full, full.new_zeros(padding, *size[1:])]) if padding else full
