"""What training on hidden states adds to a student, and takes away again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..model import BRIDGE
from ..parallel import Topology

__all__ = ["Bridge", "attach", "detach"]


class Bridge(nn.Module):
    """The map that raises the student's states to the teacher's width, and the weight of the states' loss.

    Every chunk holds a copy, whose gradient is the sum over all of them, so that the map does not depend on the layout:
    mcore adds what is marked `pipeline_parallel` up over the pipeline stages (distributed/finalize_model_grads.py), of
    buckets of their own (`shared_embedding`), over tp with sequence parallelism, and counts all but the first copy
    (`shared`) out of the gradient's norm.
    """

    alpha: Tensor
    """fp64 [1], of the next step; not a number before the first."""

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

    def sharded_state_dict(self, prefix: str = "", *_: Any, **__: Any) -> dict[str, Any]:
        """mcore's: one tensor in the checkpoint, of which every rank and chunk has a copy."""
        from megatron.core.utils import make_sharded_tensor_for_checkpoint

        replica = (self.copy, self.topology.tp_rank, self.topology.dp_rank)
        return {
            f"{prefix}{name}": make_sharded_tensor_for_checkpoint(tensor, f"{prefix}{name}", replica_id=replica)
            for name, tensor in self.state_dict(keep_vars=True).items()
        }


def attach(student: Sequence[Any], widths: tuple[int, int] | None, topology: Topology, seed: int) -> list[Bridge]:
    """Gives each chunk its bridge, the same on every rank. widths: (student's, teacher's) to be mapped; None: nothing.

    It is to be done before the optimizer is made. Not collective.
    """
    bridges = []
    for virtual, chunk in enumerate(student):
        linear = None if widths is None else _linear(*widths, seed, chunk.config.params_dtype).to(topology.device)
        bridge = Bridge(linear, topology, virtual * topology.pp + topology.pp_rank)
        setattr(chunk, BRIDGE, bridge)
        chunk.config.has_cond_embedder = linear is not None  # mcore's switch for sums over the pipeline stages
        bridges.append(bridge)
    return bridges


def detach(student: Sequence[Any]) -> None:
    """Leaves of each chunk what it was."""
    for chunk in student:
        if hasattr(chunk, BRIDGE):
            delattr(chunk, BRIDGE)
        chunk.config.has_cond_embedder = False


def _linear(ours: int, theirs: int, seed: int, dtype: torch.dtype) -> nn.Linear:
    """Weights as torch's Linear draws them, from a seed; no bias at first."""
    linear, bound = nn.Linear(ours, theirs), 1 / math.sqrt(ours)
    nn.init.uniform_(linear.weight, -bound, bound, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(linear.bias)
    return linear.to(dtype)
