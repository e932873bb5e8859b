"""Assignment of samples to steps and data-parallel ranks, and the random draw of calibration samples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from .. import numbers
from ..errors import RecipeError
from ..parallel import AttentionContext, ContextShard, Topology
from .corpus import Blend, Corpus, Sample

__all__ = ["Batch", "calibration", "calibration_batches", "check_split", "held_out_batches", "step_batches"]


@dataclass(frozen=True)
class Batch:
    """Micro-batch."""

    tokens: Int64[Tensor, "batch seq"]
    labels: Int64[Tensor, "batch seq"]
    """Next token of each token."""
    mask: Bool[Tensor, "batch seq"]
    """Whether a token, of which the label is predicted, counts in the loss."""
    attention_context: AttentionContext | None = None
    """None: each sample is one document."""

    @property
    def counted(self) -> Tensor:
        """Number of tokens over which the loss is averaged, on this rank."""
        return self.mask.sum()

    def to(self, device: torch.device) -> Self:
        return replace(self, tokens=self.tokens.to(device), labels=self.labels.to(device), mask=self.mask.to(device))

    def shared(self, topology: Topology) -> Self:
        """Return this rank's part of the batch, where context-parallel ranks share sequences.

        Raises RecipeError where the sequence length does not fit.
        """
        if topology.cp == 1:
            return self
        sequence, unit = self.tokens.shape[1], topology.sequence_unit
        if sequence % unit:
            raise RecipeError(
                f"sequences of {sequence} tokens cannot be split over cp={topology.cp}. Choose a multiple of {unit}."
            )
        shard = ContextShard(topology.cp_rank, topology.cp, topology.cp_group, sequence)
        context = replace(self.attention_context or AttentionContext(), shard=shard)
        tokens, labels, mask = (shard.take(part) for part in (self.tokens, self.labels, self.mask))
        return replace(self, tokens=tokens, labels=labels, mask=mask, attention_context=context)


def step_batches(
    corpus: Corpus, step: int, *, global_batch: int, micro_batch: int, dp_rank: int, dp: int
) -> list[Batch]:
    """Return the micro-batches of a data-parallel rank at a step, counted from 0.

    At any `dp` and `micro_batch`, the ranks together read the samples from `step * global_batch` to `(step + 1) *
    global_batch - 1`. Raises RecipeError where `global_batch` is not a multiple of `micro_batch * dp`.
    """
    check_split("global_batch", global_batch, micro_batch, dp)
    share = global_batch // dp
    start = step * global_batch + dp_rank * share
    starts = range(start, start + share, micro_batch)
    return [_stack((corpus[i] for i in range(a, a + micro_batch)), corpus.end) for a in starts]


def calibration(
    blend: Blend, *, samples: int, sequence: int, seed: int, cache: str | Path, end: int | None = None
) -> Corpus:
    """Draw `samples` different sequences at random from the training splits. Collective, as Corpus is.

    Raises DataError where a corpus holds too few sequences for its share.
    """
    return Corpus(blend, "train", sequence=sequence, samples=samples, seed=seed, cache=cache, repeat=False, end=end)


def calibration_batches(corpus: Corpus, *, micro_batch: int, dp_rank: int, dp: int) -> list[Batch]:
    """Return a data-parallel rank's share of all samples of `corpus`, the same number on every rank.

    Raises RecipeError where the number of samples is not a multiple of `micro_batch * dp`.
    """
    check_split("samples", len(corpus), micro_batch, dp)
    return step_batches(corpus, 0, global_batch=len(corpus), micro_batch=micro_batch, dp_rank=dp_rank, dp=dp)


def held_out_batches(corpus: Corpus, *, micro_batch: int, dp_rank: int, dp: int, rounds: int = 1) -> list[Batch]:
    """Return a data-parallel rank's share of all samples of `corpus`, for any number of samples.

    Every rank gets the same number of micro-batches, a multiple of `rounds`. They are filled up with samples whose mask
    is false, so that every sample counts exactly once at any `dp`.
    """
    unit = micro_batch * dp * rounds
    share = -(-len(corpus) // unit) * micro_batch * rounds

    def sample(index: int) -> Sample:
        found = corpus[min(index, len(corpus) - 1)]
        return found if index < len(corpus) else found._replace(mask=torch.zeros_like(found.mask))

    starts = range(dp_rank * share, (dp_rank + 1) * share, micro_batch)
    return [_stack((sample(i) for i in range(a, a + micro_batch)), corpus.end) for a in starts]


def check_split(name: str, total: int, micro_batch: int, dp: int) -> None:
    """Raise RecipeError unless `total` samples divide into micro-batches on `dp` data-parallel ranks."""
    unit = micro_batch * dp
    if total < 1 or total % unit:
        below = total // unit * unit
        near = f"{below} or {below + unit}" if below > 0 else f"{unit}"
        raise RecipeError(
            f"{name} is {total}, which cannot be split into micro-batches of {micro_batch} on "
            f"{numbers.counted(dp, 'data-parallel rank')}. Choose a multiple of {unit}, such as {near}."
        )


def _stack(samples: Iterable[Sample], end: int | None) -> Batch:
    """Stack samples to a Batch. end: end-of-document token; documents are then separate, and the loss does not count at
    the last token of one, since the next token is unrelated. None: attention crosses document boundaries."""
    tokens, labels, mask, ends = (torch.stack(parts) for parts in zip(*samples, strict=True))
    context = None if end is None else AttentionContext(documents=ends.cumsum(1) - ends.long())
    return Batch(tokens, labels, mask, context)
