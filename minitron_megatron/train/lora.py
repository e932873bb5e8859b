"""LoRA: low-rank corrections that train instead of the layers' matrices (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..layout import Shape, expert_of, layer_of, lookup
from ..model import LORA, Model, NamedShard, chunks_of, named_shards, overlay, shape_of
from ..parallel import Topology, sum_gradient
from .frozen import freeze_but

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedStateDict

__all__ = ["Lora", "initial_down"]

SCALE = 2.0
"""Factor of the correction: peft's alpha / r at its usual alpha = 2 r."""


class Lora:
    """Trains `up @ down` for each linear layer outside the experts of an unwrapped model; all else is frozen.

    The layers compute with weight + correction, which costs more than it saves if a micro-batch has fewer tokens than
    the rank. The sum is kept for the backward pass and needs as much memory as those weights. The correction is the
    same at every layout.
    """

    def __init__(self, model: Model, topology: Topology, *, rank: int = 16, seed: int = 0) -> None:
        """rank: columns of `up`. seed: of the initial `down`; `up` starts as zero. Not collective."""
        self.chunks = chunks_of(model)
        freeze_but(self.chunks, lambda name: False)
        self._handles = []
        for chunk in self.chunks:
            shards = [shard for shard in named_shards(chunk) if _is_corrected(shard.name)]
            corrections = [_Correction(shard, shape_of(chunk), topology, rank, seed) for shard in shards]
            setattr(chunk, LORA, _Corrections(corrections))
            for shard, correction in zip(shards, corrections, strict=True):
                self._handles += overlay(shard.module, correction)

    def merge(self) -> None:
        """Add the corrections to the weights, and make the model plain again with all parameters trainable."""
        for handle in self._handles:
            handle.remove()
        for chunk in self.chunks:
            corrections = getattr(chunk, LORA).each
            delattr(chunk, LORA)
            shards = {shard.name: shard.tensor for shard in named_shards(chunk)}
            with torch.no_grad():
                for correction in corrections:
                    weight = shards[correction.name]
                    weight.copy_(weight.float() + correction.delta().float())
        freeze_but(self.chunks, lambda name: True)


def initial_down(name: str, columns: int, rank: int, seed: int) -> Tensor:
    """Return the initial `down` of parameter `name`: fp32 [rank, columns], uniform like torch's Linear weights."""
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return (torch.rand(rank, columns, generator=generator) * 2 - 1) / math.sqrt(columns)


def _is_corrected(name: str) -> bool:
    linear = "linear_" in name and name.endswith(".weight")
    return linear and layer_of(name) is not None and expert_of(name) is None


class _Correction(nn.Module):
    """Correction of one matrix whose rows or columns tp splits: weight -> weight + correction."""

    def __init__(self, shard: NamedShard, shape: Shape, topology: Topology, rank: int, seed: int) -> None:
        super().__init__()
        param, sizes = lookup(shard.name), shape.sizes()
        self.name, self.topology, self.split = shard.name, topology, param.tp_dim
        rows, columns = (param.shard_rows(dim, sizes, topology.tp_rank, topology.tp) for dim in (0, 1))
        runs = param.stride(sizes) if self.split == 0 else 1
        weight = shard.tensor
        down = initial_down(shard.name, param.shape(sizes)[1], rank, seed)[:, columns]
        self.down = nn.Parameter(down.to(weight.device, weight.dtype))
        self.up = nn.Parameter(weight.new_zeros(runs, len(rows) // runs, rank))
        for sharded_dim, parameter in ((0, self.up), (1, self.down)):  # mcore's mark of tp-sharded parameters
            parameter.tensor_model_parallel = self.split == sharded_dim  # type: ignore[attr-defined]

    def delta(self) -> Tensor:
        """Return this rank's part of the correction: [rows, columns]."""
        up, group = self.up.flatten(0, 1), self.topology.tp_group
        if self.split == 0:
            return SCALE * up @ sum_gradient(self.down, group)
        return SCALE * sum_gradient(up, group) @ self.down

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.delta()


class _Corrections(nn.Module):
    """Corrections of one model chunk."""

    def __init__(self, corrections: Sequence[_Correction]) -> None:
        super().__init__()
        self.each: Any = nn.ModuleList(corrections)

    def sharded_state_dict(self, prefix: str = "", *_: object, **__: object) -> ShardedStateDict:
        """Return mcore's sharded state, keyed by global layer number; `up` has one run of rows per fused part."""
        from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint

        found = {}
        for number, correction in enumerate(self.each):
            for leaf, split_dim in (("up", 0), ("down", 1)):
                tensor, key = getattr(correction, leaf), f"{LORA}.{correction.name}.{leaf}"
                found[f"{prefix}each.{number}.{leaf}"] = (
                    make_tp_sharded_tensor_for_checkpoint(tensor, key, tp_axis=1)
                    if correction.split == split_dim
                    else make_sharded_tensor_for_checkpoint(tensor, key)
                )
        return found
