"""A teacher that is corrected while it teaches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..data import Batch
from ..losses import KDLoss
from ..model import output_weight
from ..parallel import Topology
from ..train import Learner, LMObjective
from .objective import KDObjective

__all__ = ["ContinuousObjective"]


class ContinuousObjective(KDObjective):
    """In each step the teacher takes one of its own, by cross-entropy on the same batch, and the student learns from
    the states of that very pass: the teacher before the step's update. One forward pass serves both.

    How often the papers refresh such a teacher is not said ([B] Fig 5); here it is every step.
    """

    def __init__(
        self, learner: Learner, topology: Topology, *, vocab: int, shared: int | None = None, loss: KDLoss | None = None
    ) -> None:
        """learner: the teacher in training; the rest as for KDObjective."""
        teacher = [chunk.module for chunk in learner.chunks]
        super().__init__(teacher, topology, vocab=vocab, shared=shared, loss=loss, freeze=False)
        self.learner = learner
        self._output: Tensor | None = None

    def prepare(self, batches: Sequence[Batch]) -> None:
        """The teacher's step. Collective over the world."""
        if self.topology.is_last_stage:
            self._output = output_weight(self.teacher[-1]).detach().clone()
        cross_entropy = _Keeping(self.topology, len(batches))
        self.learner.step(batches, cross_entropy)
        self._hidden = cross_entropy.hidden

    def _output_weight(self) -> Tensor:
        assert self._output is not None
        return self._output


class _Keeping(LMObjective):
    """Cross-entropy that leaves the final hidden states of each micro-batch."""

    def __init__(self, topology: Topology, micro_batches: int) -> None:
        super().__init__(topology)
        self.hidden: list[Any] = [None] * micro_batches

    def loss(self, chunk: Any, hidden: Tensor, batch: Batch, index: int) -> Tensor:
        self.hidden[index] = hidden.detach()
        return super().loss(chunk, hidden, batch, index)
