"""Objectives: the losses that a training step minimises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from ..data import Batch
from ..losses import lm_loss
from ..model import output_weight, shape_of
from ..parallel import Topology

__all__ = ["LMObjective", "Objective"]


class Objective(Protocol):
    """A loss over final hidden states. Plugin point: any class with these methods can be trained.

    An objective may also have:
    `window`: the number of micro-batches that one `prepare` covers (default: all of a step);
    `forward(chunk, batch, index) -> hidden`: replaces a chunk's forward pass over micro-batch `index` in training;
    `finish() -> values`: called on every rank after a step; returns measurements besides the loss.
    Both methods may be collective over the ranks that call them.
    """

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Prepare for a window of micro-batches, numbered from 0; called on every rank. May be collective."""

    def loss(self, chunk: Any, hidden: Tensor, batch: Batch, index: int) -> Tensor:
        """Return the loss in nats, summed over micro-batch `index`'s counted tokens: scalar. Last pipeline stage only.

        hidden: [seq (over tp with sequence parallelism), batch, hidden]; chunk: the model chunk that computed it.
        """
        ...


class LMObjective:
    """Next-token cross-entropy."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Do nothing: the batch holds all that the loss needs."""

    def loss(self, chunk: Any, hidden: Tensor, batch: Batch, index: int) -> Tensor:
        return lm_loss(
            hidden,
            output_weight(chunk),
            batch.labels,
            batch.mask,
            vocab=shape_of(chunk).vocab,
            group=self.topology.tp_group,
            sequence_parallel=self.topology.sequence_parallel,
        )
