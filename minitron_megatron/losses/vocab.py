"""Divergences of one chunk of logits, whose vocabulary is split over a group: value and gradient in one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..parallel import Group, all_reduce, group_rank, group_size

__all__ = ["CrossEntropy", "ForwardKL", "Vocabulary"]


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary of `size` real entries, split evenly over `group` with padding at the end."""

    size: int
    group: Group

    def start(self, held: int) -> int:
        """The first entry of this rank, which holds `held` rows of the output weight."""
        return group_rank(self.group) * held

    def real(self, weight: Tensor) -> Tensor:
        """The rows of this rank's output weight that are entries and not padding: a view [v, h]."""
        held = weight.shape[0]
        return weight[: max(0, min(held, self.size - self.start(held)))]

    def log_normalisers(self, *logits: Tensor) -> list[Tensor]:
        """log sum exp over the whole vocabulary of each of `logits` [n, v]: [n, 1]. Two all-reduces for all of them."""
        local = torch.stack(
            [each.logsumexp(-1) if each.shape[-1] else each.new_full((len(each),), -torch.inf) for each in logits]
        )
        top = all_reduce(local.clone(), self.group, "max")
        total = all_reduce((local - top).exp_(), self.group)
        return list((top + total.log_()).unsqueeze(-1))


@dataclass(frozen=True)
class CrossEntropy:
    """-log p(label), in nats."""

    vocabulary: Vocabulary
    labels: Tensor
    """int64 [n]."""
    held: int
    """Rows of this rank's output weight, padding included."""

    def __call__(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """logits: fp32 [c, v], overwritten. Returns this rank's part of each token's loss [c], and the gradient."""
        (normaliser,) = self.vocabulary.log_normalisers(logits)
        label = self.labels[rows] - self.vocabulary.start(self.held)
        mine = ((label >= 0) & (label < logits.shape[1])).nonzero().flatten()
        at = (mine, label[mine])
        loss = normaliser.flatten() / group_size(self.vocabulary.group)
        loss[mine] -= logits[at]
        gradient = logits.sub_(normaliser).exp_()
        gradient[at] -= 1
        return loss, gradient


@dataclass(frozen=True)
class ForwardKL:
    """KL(teacher || student) at a temperature, in nats: sum p_t (log p_t - log p_s). Source: Minitron section 3."""

    vocabulary: Vocabulary
    teacher: Callable[[slice], Tensor]
    """Rows -> the teacher's logits, fp32 [c, v], to be overwritten."""
    temperature: float = 1.0

    def __call__(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """logits: fp32 [c, v], overwritten. Returns this rank's part of each token's loss [c], and its gradient [c, v].

        Live at once: three tensors of [c, v].
        """
        student, teacher = logits, self.teacher(rows)
        if self.temperature != 1:
            student, teacher = student.div_(self.temperature), teacher.div_(self.temperature)
        of_student, of_teacher = self.vocabulary.log_normalisers(student, teacher)
        log_student, log_teacher = student.sub_(of_student), teacher.sub_(of_teacher)
        p_teacher = log_teacher.exp()
        loss = log_teacher.sub_(log_student).mul_(p_teacher).sum(-1)
        gradient = log_student.exp_().sub_(p_teacher)
        return loss, gradient if self.temperature == 1 else gradient.div_(self.temperature)
