"""A vocabulary that is split over a group, and the cross-entropy of one chunk of its logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import RecipeError
from ..parallel import Group, all_reduce, all_to_all, group_rank, group_size

__all__ = ["CrossEntropy", "Entries", "Vocabulary"]


class Entries(Protocol):
    """What logits [c, v] are over: this rank's part of `size` entries, which `ranks` ranks hold between them."""

    @property
    def size(self) -> int: ...

    @property
    def ranks(self) -> int: ...

    def log_softmax_(self, *logits: Tensor) -> None:
        """Makes each of `logits` [c, v] its logarithmic softmax over all entries."""
        ...

    def total(self, part: Tensor) -> Tensor:
        """The sum over the ranks of what each has of a number."""
        ...


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary of `size` real entries, split evenly over `group` with padding at the end."""

    size: int
    group: Group

    @property
    def ranks(self) -> int:
        return group_size(self.group)

    def start(self, held: int) -> int:
        """The first entry of this rank, which holds `held` rows of the output weight."""
        return group_rank(self.group) * held

    def entries(self, rank: int, held: int) -> range:
        """The entries of a rank of the group, where each holds `held` rows."""
        return range(min(rank * held, self.size), min((rank + 1) * held, self.size))

    def real(self, weight: Tensor) -> Tensor:
        """The rows of this rank's output weight that are entries and not padding: a view [v, h]."""
        return weight[: len(self.entries(group_rank(self.group), weight.shape[0]))]

    def aligned(self, weight: Tensor, held: int) -> Tensor:
        """The rows of another model's output weight for the entries that are this rank's where it holds `held` rows.

        A view where both are padded alike or there is one rank; else a copy, collective over the group.
        """
        theirs, me = weight.shape[0], group_rank(self.group)
        if theirs == held or self.ranks == 1:
            return self.real(weight)
        mine, wanted = self.entries(me, theirs), self.entries(me, held)
        sent = [_overlap(mine, self.entries(rank, held)) for rank in range(self.ranks)]
        got = [_overlap(wanted, self.entries(rank, theirs)) for rank in range(self.ranks)]
        parts = [weight[each.start - mine.start : each.stop - mine.start] for each in sent]
        return torch.cat(all_to_all(parts, [len(each) for each in got], self.group))

    def check(self, weight: Tensor, whose: str) -> None:
        """Raises RecipeError where a model's output weight has no row for some entry."""
        rows = weight.shape[0] * self.ranks
        if rows < self.size:
            raise RecipeError(
                f"the {whose} has {rows} rows in its output layer, fewer than the {self.size} vocabulary entries. "
                "Teacher and student must share a vocabulary; only their padding may differ."
            )

    def log_softmax_(self, *logits: Tensor) -> None:
        """Two all-reduces for all of them. The largest logit is taken off first, as the sum of exponents is then small
        and its logarithm as exact as fp32 can be."""
        top = [each.amax(-1) if each.shape[-1] else each.new_full((len(each),), -torch.inf) for each in logits]
        for each, largest in zip(logits, all_reduce(torch.stack(top), self.group, "max"), strict=True):
            each.sub_(largest.unsqueeze(-1))
        total = all_reduce(torch.stack([each.exp().sum(-1) for each in logits]), self.group)
        for each, normaliser in zip(logits, total.log_(), strict=True):
            each.sub_(normaliser.unsqueeze(-1))

    def total(self, part: Tensor) -> Tensor:
        """The sum of every rank's `part`."""
        return all_reduce(part.clone(), self.group)


def _overlap(a: range, b: range) -> range:
    start = max(a.start, b.start)
    stop = min(a.stop, b.stop)
    return range(start, stop) if start < stop else range(a.start, a.start)


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
        self.vocabulary.log_softmax_(logits)
        label = self.labels[rows] - self.vocabulary.start(self.held)
        mine = ((label >= 0) & (label < logits.shape[1])).nonzero().flatten()
        at = (mine, label[mine])
        loss = logits.new_zeros(len(logits)).index_put_((mine,), -logits[at])
        gradient = logits.exp_()
        gradient[at] -= 1
        return loss, gradient
