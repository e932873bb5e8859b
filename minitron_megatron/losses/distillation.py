"""What a student learns from its teacher's logits, as data, and how one chunk of tokens is worth it."""

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
    """A divergence from the teacher, and how much cross-entropy beside it. Raises RecipeError for what cannot be."""

    divergence: str = "forward_kl"
    """A name in DIVERGENCES."""
    beta: float | None = None
    """The teacher's share of jsd's mixture; None: a half."""
    temperature: float = 1.0
    """Divides both models' logits, and nothing else."""
    top_k: int | None = None
    """Only the teacher's likeliest entries of each token, both softmaxes over these; None: the whole vocabulary."""
    ce_weight: float = 0.0
    """Of the cross-entropy with the next token (at temperature 1), beside the divergence's weight of 1."""
    budget_bytes: int | None = None
    """For the logits that are alive at once; None: see `chunk_tokens`."""

    def __post_init__(self) -> None:
        _ = self.measure
        expect_number("temperature of the loss", self.temperature, above=0)
        expect_number("ce_weight", self.ce_weight, at_least=0)
        for name, count in (("top_k", self.top_k), ("budget", self.budget_bytes)):
            if count is not None:
                expect_number(f"{name} of the loss", count, above=0, whole=True)

    def check(self, vocab: int) -> None:
        """Raises RecipeError where a vocabulary of `vocab` entries is too small for this loss."""
        if self.top_k is not None and self.top_k > vocab:
            raise RecipeError(f"top_k is {self.top_k}, but there are {vocab} vocabulary entries. Ask for fewer.")

    @cached_property
    def measure(self) -> Divergence:
        return divergence_named(self.divergence, **({} if self.beta is None else {"beta": self.beta}))

    @property
    def live(self) -> int:
        """Tensors of fp32 [c, v] alive at once."""
        divergence = self.measure.live if self.top_k is None else max(self.measure.live, LIVE_KEYS)
        return divergence + (self.ce_weight > 0)


@dataclass(frozen=True)
class Distillation:
    """The loss of a chunk: the divergence from the teacher, plus cross-entropy where it is wanted."""

    loss: KDLoss
    vocabulary: Vocabulary
    teacher: Callable[[slice], Tensor]
    """Rows -> the teacher's logits, fp32 [c, v], to be overwritten."""
    held: int
    """Rows of this rank's student output weight, padding included."""
    cross_entropy: CrossEntropy | None = None
    of_labels: Tensor | None = None
    """Where given, this rank's part of the cross-entropy is added to it, summed and without its weight."""

    def __call__(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """logits: fp32 [c, v], overwritten. Returns this rank's part of each token's loss [c], and the gradient."""
        if self.cross_entropy is None:
            return self._divergence(logits, rows)
        of_label, towards_label = self.cross_entropy(logits.clone(), rows)
        if self.of_labels is not None:
            self.of_labels.add_(of_label.sum())
        value, gradient = self._divergence(logits, rows)
        weight = self.loss.ce_weight
        return value.add_(of_label, alpha=weight), gradient.add_(towards_label, alpha=weight)

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
