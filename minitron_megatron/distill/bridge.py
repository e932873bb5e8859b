"""Projection between hidden sizes that a student carries while it is trained on hidden states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..model import BRIDGE, Chunk
from ..parallel import Topology

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing.mapping import ShardedStateDict

__all__ = ["Bridge", "attach", "detach"]


class Bridge(nn.Module):
    """Linear map from the student's to the teacher's hidden size, and the weight alpha of the loss on states.

    Every chunk of the student holds a copy. The gradient is summed over all copies, so that the map does not depend on
    the layout. The parameters carry mcore's attributes for that (distributed/finalize_model_grads.py):
    `pipeline_parallel` sums gradients over the pipeline stages, `shared_embedding` gives the parameter a bucket of its
    own, `sequence_parallel` sums over tp, and `shared` keeps all copies but the first out of the gradient norm.
    """

    alpha: Tensor
    """fp64 [1]: alpha of the next step; NaN before the first step."""

    def __init__(self, linear: nn.Linear | None, topology: Topology, copy: int) -> None:
        super().__init__()
        self.linear, self.topology, self.copy = linear, topology, copy
        self.register_buffer("alpha", torch.full((1,), math.nan, dtype=torch.float64, device=topology.device))
        for parameter in self.parameters():
            marks = {"sequence_parallel": topology.sequence_parallel, "shared": copy > 0}
            parameter.__dict__.update(marks | {"pipeline_parallel": True, "shared_embedding": True})

    def forward(self, states: Tensor) -> Tensor:
        """[..., student's hidden] -> [..., teacher's hidden]."""
        return states if self.linear is None else self.linear(states)

    def sharded_state_dict(self, prefix: str = "", *_: object, **__: object) -> ShardedStateDict:
        """Return mcore's sharded state: one tensor per parameter in the checkpoint, replicated on ranks and chunks."""
        from megatron.core.utils import make_sharded_tensor_for_checkpoint

        replica = (self.copy, self.topology.tp_rank, self.topology.dp_rank)
        return {
            f"{prefix}{name}": make_sharded_tensor_for_checkpoint(tensor, f"{prefix}{name}", replica_id=replica)
            for name, tensor in self.state_dict(keep_vars=True).items()
        }


def attach(student: Sequence[Chunk], widths: tuple[int, int] | None, topology: Topology, seed: int) -> list[Bridge]:
    """Give each chunk of the student a bridge, with the same weights on every rank. Not collective.

    Call it before the optimizer is built. widths: (student's, teacher's) hidden size; None: no linear map.
    """
    bridges = []
    for virtual, chunk in enumerate(student):
        linear = None if widths is None else _linear(*widths, seed, chunk.config.params_dtype).to(topology.device)
        bridge = Bridge(linear, topology, virtual * topology.pp + topology.pp_rank)
        setattr(chunk, BRIDGE, bridge)
        chunk.config.has_cond_embedder = linear is not None  # mcore's switch for sums over the pipeline stages
        bridges.append(bridge)
    return bridges


def detach(student: Sequence[Chunk]) -> None:
    """Remove the bridges from the student's chunks."""
    for chunk in student:
        if hasattr(chunk, BRIDGE):
            delattr(chunk, BRIDGE)
        chunk.config.has_cond_embedder = False


def _linear(student: int, teacher: int, seed: int, dtype: torch.dtype) -> nn.Linear:
    """Return a linear layer with torch's usual initial distribution, drawn from `seed`, and a zero bias."""
    linear, bound = nn.Linear(student, teacher), 1 / math.sqrt(student)
    nn.init.uniform_(linear.weight, -bound, bound, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(linear.bias)
    return linear.to(dtype)
