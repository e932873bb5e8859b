"""What a training step minimises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from ..data import Batch
from ..losses import lm_loss
from ..model import config_of, output_weight
from ..parallel import Topology

__all__ = ["LMObjective", "Objective"]


class Objective(Protocol):
    """A loss over final hidden states. A plugin point: anything of this form trains.

    It may have an attribute `window`, how many micro-batches of a step it can be prepared for at a time (else all), and
    two methods more. `forward(chunk, batch, index) -> hidden` stands in the place of a chunk's forward pass
    over micro-batch `index` in training, and `finish() -> values` is called on every rank after a step: what it
    measured beside its loss. Both may be collective over the ranks that call them.
    """

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Called on every rank before the passes over a window's micro-batches, numbered from 0. May be collective."""

    def loss(self, chunk: Any, hidden: Tensor, batch: Batch, index: int) -> Tensor:
        """The loss in nats, summed over the counted tokens of micro-batch `index`: scalar. Last pipeline stage only.

        hidden: [seq (over tp with sequence parallelism), batch, hidden]; chunk: the model chunk that gave it.
        """
        ...


class LMObjective:
    """Cross-entropy with the next token."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Nothing: the batch holds all that the loss needs."""

    def loss(self, chunk: Any, hidden: Tensor, batch: Batch, index: int) -> Tensor:
        return lm_loss(
            hidden,
            output_weight(chunk),
            batch.labels,
            batch.mask,
            vocab=config_of(chunk).shape.vocab,
            group=self.topology.tp_group,
            sequence_parallel=self.topology.sequence_parallel,
        )
