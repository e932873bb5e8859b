"""Distillation loss on logits: its settings, and its value and gradient for one chunk of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

from jaxtyping import Float32
from torch import Tensor

from ..errors import RecipeError
from ..settings import AfterValidator, Count, Field, HowToRun, NotNegative, Positive, Settings, model_validator
from .divergences import DIVERGENCES, Divergence, Logits, PerToken, divergence_named
from .shortlist import LIVE_KEYS, over_shortlist
from .vocab import CrossEntropy, Vocabulary

__all__ = ["Distillation", "KDLoss"]


class KDLoss(Settings):
    """Loss between the teacher's and the student's logits. The defaults are the papers' best."""

    divergence: Annotated[str, AfterValidator(DIVERGENCES.known), Field(examples=[*DIVERGENCES])] = "forward_kl"
    """Divergence between teacher and student: forward_kl, reverse_kl, jsd, mse or cosine."""
    beta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Weight of the teacher in the mixture of jsd, by default 0.5. Only for jsd."""
    temperature: Positive = 1.0
    """Softmax temperature: divides both models' logits; the loss is not rescaled. It has no effect on cosine."""
    top_k: Count | None = None
    """Use only the teacher's top-k vocabulary entries of each token; both softmaxes are renormalised over them."""
    ce_weight: NotNegative = 0.0
    """Weight of the next-token cross-entropy (at temperature 1); the divergence has weight 1."""
    budget_mib: HowToRun[Count | None] = None
    """Memory for chunks of logits, in MiB; more memory means larger chunks. Default: an eighth of the full logits, at
    most 1 GiB."""

    @model_validator(mode="after")
    def _has_its_constants(self) -> KDLoss:
        _ = self.measure
        return self

    def check(self, vocab: int) -> None:
        """Raise RecipeError where a vocabulary of `vocab` entries is smaller than `top_k`."""
        if self.top_k is not None and self.top_k > vocab:
            raise RecipeError(f"`top_k` is {self.top_k}, but there are {vocab} vocabulary entries. Ask for fewer.")

    @cached_property
    def measure(self) -> Divergence:
        return divergence_named(self.divergence, **({} if self.beta is None else {"beta": self.beta}))

    @property
    def budget_bytes(self) -> int | None:
        return None if self.budget_mib is None else self.budget_mib * 2**20

    @property
    def live(self) -> int:
        """Number of tensors of the logits' size alive at once."""
        divergence = self.measure.live if self.top_k is None else max(self.measure.live, LIVE_KEYS)
        return divergence + (self.ce_weight > 0)


@dataclass(frozen=True)
class Distillation:
    """Loss of one chunk: the divergence from the teacher, plus cross-entropy where `cross_entropy` is given."""

    loss: KDLoss
    vocabulary: Vocabulary
    teacher: Callable[[slice], Logits]
    """Rows -> the teacher's logits, which may be overwritten."""
    held: int
    """Rows of this rank's student output weight, padding included."""
    cross_entropy: CrossEntropy | None = None
    of_labels: Float32[Tensor, ""] | None = None
    """Tensor to which this rank's part of the summed, unweighted cross-entropy is added."""

    def __call__(self, logits: Logits, rows: slice) -> tuple[PerToken, Logits]:
        """Return this rank's part of each token's loss, and the gradient. logits: overwritten."""
        if self.cross_entropy is None:
            return self._divergence(logits, rows)
        ce, ce_gradient = self.cross_entropy(logits.clone(), rows)
        if self.of_labels is not None:
            self.of_labels.add_(ce.sum())
        value, gradient = self._divergence(logits, rows)
        weight = self.loss.ce_weight
        return value.add_(ce, alpha=weight), gradient.add_(ce_gradient, alpha=weight)

    def _divergence(self, student: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        teacher, temperature = self.teacher(rows), self.loss.temperature
        if temperature != 1:
            student, teacher = student.div_(temperature), teacher.div_(temperature)
        if self.loss.top_k is None:
            value, gradient = self.loss.measure(student, teacher, self.vocabulary)
        else:
            start = self.vocabulary.start(self.held)
            value, gradient = over_shortlist(
                self.loss.measure, student, teacher, self.loss.top_k, self.vocabulary, start
            )
        return value, gradient if temperature == 1 else gradient.div_(temperature)
