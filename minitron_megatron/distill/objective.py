"""A divergence from the teacher as a training objective."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..data import Batch
from ..errors import RecipeError
from ..losses import KDLoss, distill_loss
from ..model import chunks_of, config_of, forward_backward, forward_only, output_weight
from ..parallel import Topology, final_hidden
from .offload import Offload
from .pack import pack_layers
from .states import StateLoss

__all__ = ["KDObjective"]


class KDObjective:
    """The teacher runs first, over a window of a step's micro-batches, and leaves its final hidden states on the last
    pipeline stage; its logits exist only chunk by chunk inside the loss. The teacher is frozen."""

    def __init__(
        self,
        teacher: Any,
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
        """teacher: the chunks of a plain model. vocab: the student's entries. shared: the entries that both have, where
        the two are counted with unlike padding. states: what is learnt beside the logits; with a weight that is found
        anew each step they want the whole step in one window. window: micro-batches that the teacher runs ahead, by
        default all of a step. offload: keep the teacher in host memory while it does not run. pack: hold its matrices
        in eight bits. freeze: let nothing of it train.

        Raises RecipeError where the vocabularies differ, or the loss asks for more than they have.
        """
        self.teacher = chunks_of(teacher)
        self.topology, self.window = topology, window
        self.loss_of, self.states = loss or KDLoss(), states
        self.vocab = _shared_vocabulary(config_of(self.teacher[0]).shape.vocab, vocab, shared)
        self.loss_of.check(self.vocab)
        self._hidden: list[Tensor] = []
        for chunk in self.teacher if freeze else ():
            chunk.requires_grad_(False).eval()
        if pack:
            pack_layers(self.teacher, topology)
        self._offload = Offload(self.teacher, topology) if offload else None

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Runs the teacher forward. Collective over the model's ranks."""
        self._begin(batches)
        with self._offload.on_device() if self._offload else nullcontext(), self._listening():
            self._hidden = forward_only(self.teacher, batches)
        self._measure(batches)

    def _begin(self, batches: Sequence[Batch]) -> None:
        if self.states:
            self.states.begin(batches)

    def _listening(self) -> AbstractContextManager[None]:
        return self.states.capturing() if self.states else nullcontext()

    def _measure(self, batches: Sequence[Batch]) -> None:
        """A first forward pass, where the weight of the states' loss is still to be found."""
        if self.states and math.isnan(self.states.alpha):
            with torch.no_grad(), self.states.measuring():
                forward_backward(self.states.student, batches, self.loss, backward=False, forward=self.forward)

    def forward(self, chunk: Any, batch: Batch, index: int) -> Tensor:
        """The student's, with the losses of its states where there are any."""
        with self.states.at(index) if self.states else nullcontext():
            return final_hidden(chunk, batch.tokens, batch.beside)

    def finish(self) -> dict[str, float]:
        """What the step measured of states. Collective over the world."""
        return self.states.finish() if self.states else {}

    def loss(self, chunk: Any, hidden: Tensor, batch: Batch, index: int) -> Tensor:
        weight = self.loss_of.ce_weight
        of_labels = hidden.new_zeros((), dtype=torch.float32) if self.states and weight else None
        total = distill_loss(
            hidden,
            output_weight(chunk),
            self._hidden[index],
            self._output_weight(),
            batch.mask,
            vocab=self.vocab,
            group=self.topology.tp_group,
            loss=self.loss_of,
            labels=batch.labels,
            of_labels=of_labels,
            sequence_parallel=self.topology.sequence_parallel,
        )
        if self.states:
            divergence = total.detach() if of_labels is None else total.detach() - weight * of_labels
            self.states.add_logits(divergence, batch.mask.sum())
        return total

    def _output_weight(self) -> Tensor:
        """That goes with the hidden states."""
        return output_weight(self.teacher[-1])

    def plain(self) -> KDObjective:
        """Forward KL from the same teacher, as it is by then: what validation measures."""
        found = object.__new__(KDObjective)
        found.__dict__ |= self.__dict__ | {"loss_of": KDLoss(), "states": None, "_hidden": []}
        return found


def _shared_vocabulary(teacher: int, student: int, shared: int | None) -> int:
    """The entries that both have. Raises RecipeError where that cannot be."""
    if shared is None and teacher != student:
        raise RecipeError(
            f"the teacher has {teacher} vocabulary entries and the student {student}. They must be the same; where "
            "they differ in padding alone, pass as `shared` how many are none."
        )
    shared = student if shared is None else shared
    if shared > min(teacher, student):
        raise RecipeError(
            f"{shared} vocabulary entries cannot be shared: the teacher has {teacher} and the student {student}. "
            "Pass the entries of their tokenizer."
        )
    return shared
