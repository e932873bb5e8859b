"""Objectives: the losses that a training step minimises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from torch import Tensor

from ..data import Batch
from ..losses import Output, Vocabulary, lm_loss
from ..model import Chunk, output_weight, shape_of
from ..parallel import Topology, final_hidden
from ..registry import Registry

__all__ = ["OBJECTIVES", "LMObjective", "Objective"]


class Objective(ABC):
    """A loss over final hidden states (a plugin point). `prepare`, `forward` and `finish` may be collective."""

    window: int | None = None
    """Micro-batches that one `prepare` covers; None: all of a step."""
    unit = "tokens"
    """Name of what `Batch.counted` counts."""

    def prepare(self, batches: Sequence[Batch]) -> None:  # noqa: B027 (most objectives need no preparation)
        """Prepare for a window of micro-batches, numbered from 0; called on every rank."""

    def forward(self, chunk: Chunk, batch: Batch, index: int) -> Tensor:
        """Return the hidden states of a chunk over micro-batch `index`, in training."""
        return final_hidden(chunk, batch.tokens, batch.attention_context)

    @abstractmethod
    def loss(self, chunk: Chunk, hidden: Tensor, batch: Batch, index: int) -> Tensor:
        """Return the loss in nats, summed over what micro-batch `index` counts: scalar. Last pipeline stage only.

        hidden: [seq (over tp with sequence parallelism), batch, hidden]; chunk: the model chunk that computed it.
        """

    def further_flops(self, sequence: int) -> int:
        """Return FLOPs per token, in samples of `sequence` tokens, of other models that the objective runs."""
        return 0

    def finish(self) -> dict[str, float]:
        """Return measurements of the step besides the loss; called on every rank after it."""
        return {}


class LMObjective(Objective):
    """Next-token cross-entropy."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology

    def loss(self, chunk: Chunk, hidden: Tensor, batch: Batch, index: int) -> Tensor:
        topology = self.topology
        vocabulary = Vocabulary(shape_of(chunk).vocab, topology.tp_group, topology.sequence_parallel)
        return lm_loss(Output(hidden, output_weight(chunk)), batch.labels, batch.mask, vocabulary)


OBJECTIVES: Registry[Callable[[Topology], Objective]] = Registry("objective", {"cross_entropy": LMObjective})
"""Objectives of a training without a teacher."""
