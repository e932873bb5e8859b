"""KL(teacher || student) as a training objective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..data import Batch
from ..errors import RecipeError
from ..losses import distill_loss
from ..model import chunks_of, config_of, forward_only, output_weight
from ..parallel import Topology

__all__ = ["KDObjective"]


class KDObjective:
    """The teacher runs first, over all micro-batches of a step, and leaves its final hidden states on the last pipeline
    stage; its logits exist only chunk by chunk inside the loss. The teacher is frozen."""

    def __init__(self, teacher: Any, topology: Topology, *, vocab: int, temperature: float = 1.0) -> None:
        """teacher: the chunks of a plain model; vocab: the student's entries. Raises RecipeError where they differ."""
        self.teacher = chunks_of(teacher)
        self.topology = topology
        self.temperature = temperature
        self._hidden: list[Tensor] = []
        theirs = config_of(self.teacher[0]).shape.vocab
        if theirs != vocab:
            raise RecipeError(
                f"the teacher has {theirs} vocabulary entries and the student {vocab}. They must be the same."
            )
        for chunk in self.teacher:
            chunk.requires_grad_(False).eval()

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Runs the teacher forward. Collective over the model's ranks."""
        self._hidden = forward_only(self.teacher, batches)

    def loss(self, chunk: Any, hidden: Tensor, batch: Batch, index: int) -> Tensor:
        shape = config_of(chunk).shape
        return distill_loss(
            hidden,
            output_weight(chunk),
            self._hidden[index],
            output_weight(self.teacher[-1]),
            batch.mask,
            vocab=shape.vocab,
            group=self.topology.tp_group,
            temperature=self.temperature,
            sequence_parallel=self.topology.sequence_parallel,
        )
