"""Vocab-parallel vocabulary: its split over a group, softmax over all ranks, and the cross-entropy of one chunk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Float32, Int64, Shaped
from torch import Tensor

from ..errors import RecipeError
from ..parallel import Group, all_reduce, all_to_all, group_rank, group_size, one_kernel

__all__ = ["CrossEntropy", "Entries", "Output", "Vocabulary", "found_at"]


class Entries(Protocol):
    """Vocabulary entries that logits cover: this rank's part of `size` entries, split over `ranks` ranks."""

    @property
    def size(self) -> int: ...

    @property
    def ranks(self) -> int: ...

    def log_softmax_(self, *logits: Float32[Tensor, "chunk entries"]) -> None:
        """Replace each of `logits` by its log-softmax over all entries, in place."""
        ...

    def total(self, part: Shaped[Tensor, "*axes"]) -> Shaped[Tensor, "*axes"]:
        """Return the sum of every rank's `part`."""
        ...


class Output(NamedTuple):
    """Factors of a model's logits, which never exist as a whole."""

    hidden: Float[Tensor, "local_seq batch hidden"]
    """Final hidden states; with sequence parallelism, of this rank's part of the sequence."""
    weight: Float[Tensor, "held hidden"]
    """This rank's rows of the output layer, with the vocabulary's padding at the end."""


@dataclass(frozen=True)
class Vocabulary:
    """Vocabulary of `size` real entries, split evenly over `group`, with padding at the end."""

    size: int
    group: Group
    sequence_parallel: bool = False
    """Whether each rank of `group` holds only its part of the sequence of hidden states."""

    @property
    def ranks(self) -> int:
        return group_size(self.group)

    def start(self, held: int) -> int:
        """Return the first entry of this rank, which holds `held` rows of the output weight."""
        return group_rank(self.group) * held

    def entries(self, rank: int, held: int) -> range:
        """Return the entries of a rank of the group, where each rank holds `held` rows."""
        return range(min(rank * held, self.size), min((rank + 1) * held, self.size))

    def real(self, weight: Float[Tensor, "held hidden"]) -> Float[Tensor, "entries hidden"]:
        """Return a view of this rank's output weight without its padding rows."""
        return weight[: len(self.entries(group_rank(self.group), weight.shape[0]))]

    def aligned(self, weight: Float[Tensor, "other_held hidden"], held: int) -> Float[Tensor, "entries hidden"]:
        """Return the rows of another model's output weight for the entries of this rank under a split of `held` rows.

        A view where both have the same padding or there is one rank; otherwise a copy, collective over the group.
        """
        other_held, rank = weight.shape[0], group_rank(self.group)
        if other_held == held or self.ranks == 1:
            return self.real(weight)
        source, target = self.entries(rank, other_held), self.entries(rank, held)
        sent = [_overlap(source, self.entries(other, held)) for other in range(self.ranks)]
        received = [_overlap(target, self.entries(other, other_held)) for other in range(self.ranks)]
        parts = [weight[each.start - source.start : each.stop - source.start] for each in sent]
        return torch.cat(all_to_all(parts, [len(each) for each in received], self.group))

    def check(self, weight: Float[Tensor, "held hidden"], whose: str) -> None:
        """Raise RecipeError where a model's output weight has fewer rows than the vocabulary has entries."""
        rows = weight.shape[0] * self.ranks
        if rows < self.size:
            raise RecipeError(
                f"the {whose} has {rows} rows in its output layer, fewer than the {self.size} vocabulary entries. "
                "Teacher and student must share a vocabulary; only their padding may differ."
            )

    def log_softmax_(self, *logits: Float32[Tensor, "chunk entries"]) -> None:
        """Replace each of `logits` by its log-softmax over all entries, in place, with two all-reduces for all.

        The maximum is subtracted first, so that the sum of exponentials is small and its logarithm precise.
        """
        rows = [each.amax(-1) if each.shape[-1] else each.new_full((len(each),), -torch.inf) for each in logits]
        top = all_reduce(torch.stack(rows), self.group, "max").unbind()
        sums = [_shifted(each, largest)[1] for each, largest in zip(logits, top, strict=True)]
        total = all_reduce(torch.stack(sums), self.group)
        for each, normaliser in zip(logits, total.log_(), strict=True):
            each.sub_(normaliser.unsqueeze(-1))

    def total(self, part: Shaped[Tensor, "*axes"]) -> Shaped[Tensor, "*axes"]:
        """Return the sum of every rank's `part`."""
        return all_reduce(part.clone(), self.group)


def found_at(
    label: Int64[Tensor, "chunk"], logits: Float32[Tensor, "chunk entries"]
) -> tuple[Bool[Tensor, "chunk 1"], Int64[Tensor, "chunk 1"]]:
    """Return (whether a label lies among a rank's entries, its column there or any other one); the host waits for
    neither. label: counted from the rank's first entry."""
    column = label.unsqueeze(-1)
    last = logits.shape[1] - 1
    return (column >= 0) & (column <= last), column.clamp(0, last)


@one_kernel
def _shifted(
    logits: Float32[Tensor, "chunk entries"], by: Float32[Tensor, "chunk"]
) -> tuple[Float32[Tensor, "chunk entries"], Float32[Tensor, "chunk"]]:
    """Subtract a number from each row, in place; return (logits, sum of each row's exponentials)."""
    logits.sub_(by.unsqueeze(-1))
    return logits, logits.exp().sum(-1)


def _overlap(a: range, b: range) -> range:
    start = max(a.start, b.start)
    stop = min(a.stop, b.stop)
    return range(start, stop) if start < stop else range(a.start, a.start)


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy -log p(label) of one chunk, in nats."""

    vocabulary: Vocabulary
    labels: Int64[Tensor, "tokens"]
    held: int
    """Rows of this rank's output weight, padding included."""

    def __call__(
        self, logits: Float32[Tensor, "chunk entries"], rows: slice
    ) -> tuple[Float32[Tensor, "chunk"], Float32[Tensor, "chunk entries"]]:
        """Return this rank's part of each token's loss, and the gradient. logits: overwritten."""
        self.vocabulary.log_softmax_(logits)
        label = self.labels[rows] - self.vocabulary.start(self.held)
        if not logits.shape[1]:  # this rank has only padding
            return logits.new_zeros(len(logits)), logits
        is_here, at = found_at(label, logits)
        loss = torch.where(is_here, -logits.gather(1, at), 0.0).squeeze(-1)
        return loss, logits.exp_().scatter_add_(1, at, -is_here.to(logits.dtype))
