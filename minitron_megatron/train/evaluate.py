"""Mean loss of a model over a fixed set of batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data import Batch
from ..model import Model, forward_backward, windows
from ..parallel import Group, Topology, all_reduce, sum_over_world
from .objective import Objective

__all__ = ["global_sums", "mean_loss"]


def mean_loss(
    model: Model, batches: Sequence[Batch], objective: Objective, topology: Topology, group: Group | None = None
) -> tuple[float, int]:
    """Return (nats per token, counted tokens) over the batches of all ranks of `group` (default: the world).

    Every rank of the group returns the same. Collective over the group. To evaluate one data-parallel replica alone,
    pass its `model_group`.
    """
    loss = torch.zeros((), dtype=torch.float64, device=topology.device)
    tokens = torch.zeros((), dtype=torch.int64, device=topology.device)
    with torch.no_grad():
        for window in windows(batches, topology.pp):
            objective.prepare(window)
            window_loss, window_tokens = forward_backward(model, window, objective.loss, backward=False)
            loss, tokens = loss + window_loss, tokens + window_tokens
    total, counted = global_sums(loss, tokens, topology, group)
    return total / max(counted, 1), counted


def global_sums(loss: Tensor, tokens: Tensor, topology: Topology, group: Group | None = None) -> tuple[float, int]:
    """Sum loss and tokens over `group` (default: the world), counting each data-parallel replica once.

    The values come from the last pipeline stage; every rank returns the sums. Collective over the group.
    """
    counted = topology.is_last_stage and topology.tp_rank == 0
    pair = torch.stack([loss.double(), tokens.double()]) * counted
    total = sum_over_world(pair) if group is None else all_reduce(pair, group)
    return float(total[0]), int(total[1])
