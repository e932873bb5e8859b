"""Distillation loss on logits: its settings, and its value and gradient for one chunk of tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ..errors import RecipeError, expect_number
from .divergences import Divergence, divergence_named
from .shortlist import LIVE_KEYS, over_shortlist
from .vocab import CrossEntropy, Vocabulary

__all__ = ["Distillation", "KDLoss"]


@dataclass(frozen=True)
class KDLoss:
    """Settings of the distillation loss: a divergence from the teacher, plus weighted cross-entropy.

    Raises RecipeError for invalid settings.
    """

    divergence: str = "forward_kl"
    """Key of DIVERGENCES."""
    beta: float | None = None
    """Teacher's share of jsd's mixture; None: 0.5."""
    temperature: float = 1.0
    """Divisor of both models' logits in the divergence; the loss is not rescaled."""
    top_k: int | None = None
    """Number of the teacher's likeliest entries of each token that both softmaxes are over; None: all entries."""
    ce_weight: float = 0.0
    """Weight of the cross-entropy with the next token (at temperature 1); the divergence has weight 1."""
    budget_bytes: int | None = None
    """Memory budget for the logits alive at once; None: the default of `chunk_tokens`."""

    def __post_init__(self) -> None:
        _ = self.measure
        expect_number("temperature of the loss", self.temperature, above=0)
        expect_number("ce_weight", self.ce_weight, at_least=0)
        for name, count in (("top_k", self.top_k), ("budget", self.budget_bytes)):
            if count is not None:
                expect_number(f"{name} of the loss", count, above=0, whole=True)

    def check(self, vocab: int) -> None:
        """Raise RecipeError where a vocabulary of `vocab` entries is smaller than `top_k`."""
        if self.top_k is not None and self.top_k > vocab:
            raise RecipeError(f"top_k is {self.top_k}, but there are {vocab} vocabulary entries. Ask for fewer.")

    @cached_property
    def measure(self) -> Divergence:
        return divergence_named(self.divergence, **({} if self.beta is None else {"beta": self.beta}))

    @property
    def live(self) -> int:
        """Number of fp32 [c, v] tensors alive at once."""
        divergence = self.measure.live if self.top_k is None else max(self.measure.live, LIVE_KEYS)
        return divergence + (self.ce_weight > 0)


@dataclass(frozen=True)
class Distillation:
    """Loss of one chunk: the divergence from the teacher, plus cross-entropy where `cross_entropy` is given."""

    loss: KDLoss
    vocabulary: Vocabulary
    teacher: Callable[[slice], Tensor]
    """Rows -> the teacher's logits, fp32 [c, v], which may be overwritten."""
    held: int
    """Rows of this rank's student output weight, padding included."""
    cross_entropy: CrossEntropy | None = None
    of_labels: Tensor | None = None
    """Scalar to which this rank's part of the summed, unweighted cross-entropy is added."""

    def __call__(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Return this rank's part of each token's loss [c], and the gradient. logits: fp32 [c, v], overwritten."""
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
