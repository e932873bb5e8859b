"""Distillation from a teacher that is corrected during distillation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from ..data import Batch
from ..losses import KDLoss
from ..model import Chunk, output_weight
from ..parallel import Topology, final_hidden
from ..train import Learner, LMObjective
from .objective import KDObjective
from .states import StateLoss

__all__ = ["ContinuousObjective"]


class ContinuousObjective(KDObjective):
    """Objective with a training teacher.

    In each step the teacher takes an optimizer step by cross-entropy on the same batch. The student learns from the
    hidden states of that forward pass, that is, from the teacher before its update: one forward pass serves both.
    The papers do not say how often such a teacher is updated ([B] Fig 5); here it is every step.
    """

    def __init__(
        self,
        learner: Learner,
        topology: Topology,
        *,
        vocab: int,
        shared: int | None = None,
        loss: KDLoss | None = None,
        states: StateLoss | None = None,
    ) -> None:
        """learner: trains the teacher. Other arguments: as for KDObjective."""
        teacher = [chunk.module for chunk in learner.chunks]
        super().__init__(teacher, topology, vocab=vocab, shared=shared, loss=loss, states=states, freeze=False)
        self.learner = learner
        self._output: Tensor | None = None

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Take the teacher's step and keep its hidden states from before the update. Collective over the world."""
        if self.topology.is_last_stage:
            self._output = output_weight(self.teacher[-1]).detach().clone()
        self._begin(batches)
        cross_entropy = _StateKeepingLM(self.topology, len(batches), self._capturing)
        self.learner.step(batches, cross_entropy)
        self._hidden = cross_entropy.hidden
        self._measure(batches)

    def further_flops(self, sequence: int) -> int:
        return 3 * super().further_flops(sequence)  # the backward pass counts as two forwards

    def finish(self) -> dict[str, float]:
        self._output = None
        return super().finish()

    def _output_weight(self) -> Tensor:
        assert self._output is not None
        return self._output


class _StateKeepingLM(LMObjective):
    """Cross-entropy that keeps the final hidden states of each micro-batch."""

    def __init__(
        self, topology: Topology, micro_batches: int, capturing: Callable[[], AbstractContextManager[None]]
    ) -> None:
        """capturing: context manager around each forward pass whose intermediate states are captured."""
        super().__init__(topology)
        self.capturing = capturing
        self.hidden: list[Any] = [None] * micro_batches

    def forward(self, chunk: Chunk, batch: Batch, index: int) -> Tensor:
        with self.capturing():
            return final_hidden(chunk, batch.tokens, batch.attention_context)

    def loss(self, chunk: Chunk, hidden: Tensor, batch: Batch, index: int) -> Tensor:
        self.hidden[index] = hidden.detach()
        return super().loss(chunk, hidden, batch, index)
