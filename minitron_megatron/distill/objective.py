"""A divergence from the teacher as a training objective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..data import Batch
from ..errors import RecipeError
from ..losses import KDLoss, distill_loss
from ..model import chunks_of, config_of, forward_only, output_weight
from ..parallel import Topology
from .offload import Offload

__all__ = ["KDObjective"]


class KDObjective:
    """The teacher runs first, over all micro-batches of a step, and leaves its final hidden states on the last pipeline
    stage; its logits exist only chunk by chunk inside the loss. The teacher is frozen."""

    def __init__(
        self,
        teacher: Any,
        topology: Topology,
        *,
        vocab: int,
        shared: int | None = None,
        loss: KDLoss | None = None,
        offload: bool = False,
        freeze: bool = True,
    ) -> None:
        """teacher: the chunks of a plain model. vocab: the student's entries. shared: the entries that both have, where
        the two are counted with unlike padding. offload: keep the teacher in host memory while it does not run. freeze:
        let nothing of it train.

        Raises RecipeError where the vocabularies differ, or the loss asks for more than they have.
        """
        self.teacher = chunks_of(teacher)
        self.topology = topology
        self.loss_of = loss or KDLoss()
        self.vocab = _shared_vocabulary(config_of(self.teacher[0]).shape.vocab, vocab, shared)
        self.loss_of.check(self.vocab)
        self._hidden: list[Tensor] = []
        for chunk in self.teacher if freeze else ():
            chunk.requires_grad_(False).eval()
        self._offload = Offload(self.teacher, topology) if offload else None

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Runs the teacher forward. Collective over the model's ranks."""
        if self._offload is None:
            self._hidden = forward_only(self.teacher, batches)
        else:
            with self._offload.on_device():
                self._hidden = forward_only(self.teacher, batches)

    def loss(self, chunk: Any, hidden: Tensor, batch: Batch, index: int) -> Tensor:
        return distill_loss(
            hidden,
            output_weight(chunk),
            self._hidden[index],
            self._output_weight(),
            batch.mask,
            vocab=self.vocab,
            group=self.topology.tp_group,
            loss=self.loss_of,
            labels=batch.labels,
            sequence_parallel=self.topology.sequence_parallel,
        )

    def _output_weight(self) -> Tensor:
        """That goes with the hidden states."""
        return output_weight(self.teacher[-1])

    def plain(self) -> KDObjective:
        """Forward KL from the same teacher, as it is by then: what validation measures."""
        found = object.__new__(KDObjective)
        found.__dict__ |= self.__dict__ | {"loss_of": KDLoss(), "_hidden": []}
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
