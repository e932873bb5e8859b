"""Which samples a data-parallel rank reads at a step, and the draw of calibration samples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import RecipeError
from ..parallel import ContextShard, Topology
from .corpus import Blend, Corpus

__all__ = ["Batch", "calibration", "calibration_batches", "held_out_batches", "step_batches"]


@dataclass(frozen=True)
class Batch:
    """A micro-batch."""

    tokens: Tensor
    """int64 [batch, seq]"""
    labels: Tensor
    """int64 [batch, seq]: the token after each token."""
    mask: Tensor
    """bool [batch, seq]: where the loss counts."""
    beside: Tensor | ContextShard | None = None
    """Where documents are apart, the number of each token's in its sample: int64 [batch, seq]. It stays on the host,
    which says what runs. Or which part of its sequences this is."""

    def to(self, device: torch.device) -> Batch:
        return Batch(self.tokens.to(device), self.labels.to(device), self.mask.to(device), self.beside)

    def shared(self, topology: Topology) -> Batch:
        """This rank's part of it, where context-parallel ranks share sequences. RecipeError where they cannot."""
        if topology.cp == 1:
            return self
        sequence, unit = self.tokens.shape[1], topology.sequence_unit
        if sequence % unit:
            raise RecipeError(
                f"sequences of {sequence} cannot be shared over cp={topology.cp}: choose a multiple of {unit}."
            )
        assert not isinstance(self.beside, ContextShard)
        span = ContextShard(topology.cp_rank, topology.cp, topology.cp_group, sequence, self.beside)
        return Batch(span.take(self.tokens), span.take(self.labels), span.take(self.mask), span)


def step_batches(
    corpus: Corpus, step: int, *, global_batch: int, micro_batch: int, dp_rank: int, dp: int
) -> list[Batch]:
    """The micro-batches of a data-parallel rank at a step, counted from 0.

    The ranks together read the samples `step * global_batch` and following at any `dp` and `micro_batch`.
    RecipeError where `global_batch` cannot be split so.
    """
    _check_split("global_batch", global_batch, micro_batch, dp)
    share = global_batch // dp
    start = step * global_batch + dp_rank * share
    starts = range(start, start + share, micro_batch)
    return [_stack((corpus[i] for i in range(a, a + micro_batch)), corpus.end) for a in starts]


def calibration(
    blend: Blend, *, samples: int, sequence: int, seed: int, cache: str | Path, end: int | None = None
) -> Corpus:
    """A random draw of `samples` different sequences from the training splits. Collective, as Corpus is.

    Raises DataError where a corpus holds too few of them for its part.
    """
    return Corpus(blend, "train", sequence=sequence, samples=samples, seed=seed, cache=cache, repeat=False, end=end)


def calibration_batches(corpus: Corpus, *, micro_batch: int, dp_rank: int, dp: int) -> list[Batch]:
    """A data-parallel rank's share of all samples of `corpus`, the same number on every rank.

    RecipeError where they cannot be split so.
    """
    _check_split("samples", len(corpus), micro_batch, dp)
    return step_batches(corpus, 0, global_batch=len(corpus), micro_batch=micro_batch, dp_rank=dp_rank, dp=dp)


def held_out_batches(corpus: Corpus, *, micro_batch: int, dp_rank: int, dp: int, rounds: int = 1) -> list[Batch]:
    """A data-parallel rank's share of all samples of `corpus`, however many: ranks get as many micro-batches each, a
    multiple of `rounds`.

    What is lacking for that is filled with samples whose mask is false, so that every sample counts once at any `dp`.
    """
    unit = micro_batch * dp * rounds
    share = -(-len(corpus) // unit) * micro_batch * rounds

    def sample(index: int) -> tuple[Tensor, Tensor, Tensor]:
        tokens, labels, mask = corpus[min(index, len(corpus) - 1)]
        return tokens, labels, mask if index < len(corpus) else torch.zeros_like(mask)

    starts = range(dp_rank * share, (dp_rank + 1) * share, micro_batch)
    return [_stack((sample(i) for i in range(a, a + micro_batch)), corpus.end) for a in starts]


def _check_split(name: str, total: int, micro_batch: int, dp: int) -> None:
    unit = micro_batch * dp
    if total < 1 or total % unit:
        below = total // unit * unit
        near = f"{below} or {below + unit}" if below > 0 else f"{unit}"
        raise RecipeError(
            f"{name}={total} cannot be split into micro-batches of {micro_batch} on {dp} data-parallel ranks. "
            f"Set it to a multiple of {unit}, such as {near}, or change micro_batch."
        )


def _stack(samples: Iterable[tuple[Tensor, Tensor, Tensor]], end: int | None) -> Batch:
    """end: the token that parts documents, after which the loss does not count: what follows has nothing to do with it.
    None: they run into each other."""
    tokens, labels, mask = (torch.stack(parts) for parts in zip(*samples, strict=True))
    if end is None:
        return Batch(tokens, labels, mask)
    ends = tokens == end
    return Batch(tokens, labels, mask & ~ends, ends.cumsum(1) - ends.long())
