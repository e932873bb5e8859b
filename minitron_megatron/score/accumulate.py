"""Streaming statistics of activations: one number per unit; only running sums are kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from ..data import Batch
from ..parallel import Group, Topology, all_reduce, local_sequence
from ..records import REDUCTIONS, Statistic

__all__ = ["Accumulator", "count"]


class Accumulator:
    """Running sums of one tap's activations under a statistic, in fp64 over samples."""

    def __init__(self, statistic: Statistic, sequence_group: Group | None = None) -> None:
        """sequence_group: the ranks that share each sample's positions (sequence parallelism)."""
        self.statistic = statistic
        self.sequence_group = sequence_group
        self.sums: Float64[Tensor, "3 units"] | None = None

    def add(self, activations: Float[Tensor, "local_seq batch units"], mask: Bool[Tensor, "batch seq"]) -> None:
        """Add one micro-batch. mask: true where a position counts, of the whole sequence.

        Collective over `sequence_group` if there is one.
        """
        a, length = activations.detach().float(), mask.sum(1).clamp(min=1).unsqueeze(1)
        if not bool(mask.all()):
            counted = mask.t()
            a = a * (
                counted if self.sequence_group is None else local_sequence(counted, self.sequence_group)
            ).unsqueeze(-1)
        per_sample = REDUCTIONS[self.statistic.sequence].over_positions(a, length, self._total)
        self.add_samples(per_sample.double(), mask.any(dim=1).double())

    def _total(self, numbers: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        sums = numbers.sum(0, dtype=dtype)
        return sums if self.sequence_group is None else all_reduce(sums, self.sequence_group)

    def add_samples(self, per_sample: Float64[Tensor, "samples units"], counted: Float64[Tensor, "samples"]) -> None:
        """Add samples already reduced over positions. counted: 1 where a sample counts."""
        moments = torch.stack(
            [counted @ per_sample, counted @ per_sample.square(), counted.sum().expand(per_sample.shape[1])]
        )
        self.sums = moments if self.sums is None else self.sums + moments

    def result(self, data_group: Group | None) -> Float64[Tensor, "units"]:
        """Reduce over the samples of all ranks of `data_group`. Collective over that group."""
        assert self.sums is not None, "no activation was added to this tap"
        total, squares, samples = self.sums if data_group is None else all_reduce(self.sums.clone(), data_group)
        return REDUCTIONS[self.statistic.batch].over_samples(total, squares, samples)


def count(batches: Sequence[Batch], topology: Topology) -> tuple[int, int]:
    """Return (samples, counted tokens) over all data-parallel ranks. Collective over dp."""
    counts = torch.tensor([sum(len(b.tokens) for b in batches), sum(int(b.mask.sum()) for b in batches)])
    samples, tokens = all_reduce(counts.to(topology.device), topology.dp_group).tolist()
    return samples, tokens
