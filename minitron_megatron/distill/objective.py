"""Training objective: divergence of the student's logits from the teacher's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ..data import Batch
from ..errors import RecipeError
from ..layout import flops_per_token
from ..losses import KDLoss, Output, Vocabulary, distill_loss
from ..model import Chunk, Model, chunks_of, forward_backward, forward_only, output_weight, shape_of
from ..parallel import Topology, final_hidden
from ..train import Objective
from .offload import Offload
from .pack import pack_layers
from .states import StateLoss

__all__ = ["KDObjective"]


class KDObjective(Objective):
    """Knowledge distillation from a frozen teacher.

    The teacher runs first, over a window of a step's micro-batches. Its final hidden states are kept on the last
    pipeline stage; its logits exist only chunk by chunk inside the loss.
    """

    def __init__(
        self,
        teacher: Model,
        topology: Topology,
        *,
        vocab: int,
        shared: int | None = None,
        loss: KDLoss | None = None,
        states: StateLoss | None = None,
        window: int | None = None,
        offload: bool = False,
        pack: bool = False,
        freeze: bool = True,
    ) -> None:
        """teacher: a plain model or its chunks. vocab: the student's vocabulary size. shared: number of entries that
        both vocabularies share, if they differ in padding. states: loss on hidden states; a dynamic alpha needs the
        whole step in one window. window: micro-batches that the teacher runs ahead, by default all of a step.
        offload: keep the teacher in host memory while it is idle. pack: store its matrices in float8. freeze: turn
        off gradients and dropout of the teacher.

        Raises RecipeError if the vocabularies differ, or if the loss's top_k exceeds the vocabulary.
        """
        self.teacher = chunks_of(teacher)
        self.topology, self.window = topology, window
        self.loss_of, self.states = loss or KDLoss(), states
        self.vocab = _shared_vocabulary(shape_of(self.teacher[0]).vocab, vocab, shared)
        self.loss_of.check(self.vocab)
        self._hidden: list[Tensor] = []
        for chunk in self.teacher if freeze else ():
            chunk.requires_grad_(False).eval()
        if pack:
            pack_layers(self.teacher, topology)
        self._offload = Offload(self.teacher, topology) if offload else None

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Run the teacher forward. Collective over the model's ranks."""
        self._begin(batches)
        with self._offload.on_device() if self._offload else nullcontext(), self._capturing():
            self._hidden = forward_only(self.teacher, batches)
        self._measure(batches)

    def _begin(self, batches: Sequence[Batch]) -> None:
        if self.states:
            self.states.begin(batches)

    def _capturing(self) -> AbstractContextManager[None]:
        return self.states.capturing() if self.states else nullcontext()

    def _measure(self, batches: Sequence[Batch]) -> None:
        """Run an extra forward pass of the student if alpha of the loss on states is not known yet."""
        if self.states and math.isnan(self.states.alpha):
            with torch.no_grad(), self.states.measuring():
                forward_backward(self.states.student, batches, self.loss, backward=False, forward=self.forward)

    def forward(self, chunk: Chunk, batch: Batch, index: int) -> Tensor:
        """Run the student forward, with the losses on its states, if any."""
        with self.states.at(index) if self.states else nullcontext():
            return final_hidden(chunk, batch.tokens, batch.attention_context)

    def further_flops(self, sequence: int) -> int:
        return flops_per_token(shape_of(self.teacher[0]), sequence)

    def finish(self) -> dict[str, float]:
        """Return the step's metrics of the loss on states, and free the teacher's states before a checkpoint is
        written. Collective over the world."""
        self._hidden = []
        return self.states.finish() if self.states else {}

    def loss(self, chunk: Chunk, hidden: Tensor, batch: Batch, index: int) -> Tensor:
        weight = self.loss_of.ce_weight
        of_labels = hidden.new_zeros((), dtype=torch.float32) if self.states and weight else None
        topology = self.topology
        total = distill_loss(
            Output(hidden, output_weight(chunk)),
            Output(self._hidden[index], self._output_weight()),
            batch.mask,
            Vocabulary(self.vocab, topology.tp_group, topology.sequence_parallel),
            loss=self.loss_of,
            labels=batch.labels,
            of_labels=of_labels,
        )
        if self.states:
            divergence = total.detach() if of_labels is None else total.detach() - weight * of_labels
            self.states.add_logits(divergence, batch.mask.sum())
        return total

    def _output_weight(self) -> Tensor:
        """Return the output weight that belongs to the teacher's hidden states."""
        return output_weight(self.teacher[-1])

    def plain(self) -> KDObjective:
        """Return forward KL from the same, current teacher, without a loss on states: the validation metric."""
        objective = KDObjective(self.teacher, self.topology, vocab=self.vocab, shared=self.vocab, freeze=False)
        objective._offload = self._offload
        return objective


def _shared_vocabulary(teacher: int, student: int, shared: int | None) -> int:
    """Return the number of vocabulary entries that both share. Raises RecipeError if that is impossible."""
    if shared is None and teacher != student:
        raise RecipeError(
            f"the teacher has {teacher} vocabulary entries and the student {student}. They must be equal; if they "
            "differ only in padding, pass the number of unpadded entries as `shared`."
        )
    shared = student if shared is None else shared
    if shared > min(teacher, student):
        raise RecipeError(
            f"{shared} vocabulary entries cannot be shared: the teacher has {teacher} and the student {student}. "
            "Pass the vocabulary size of their tokenizer."
        )
    return shared
