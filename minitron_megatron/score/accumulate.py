"""Activations -> one number a unit, streamed: only sums are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from ..parallel import Group, all_reduce, group_rank, group_size
from ..records import Statistic

__all__ = ["Accumulator"]


class Accumulator:
    """Adds up the activations of one tap by a statistic, in fp64 over samples."""

    def __init__(self, statistic: Statistic, sequence_group: Group | None = None) -> None:
        """sequence_group: the ranks that share each sample's positions (sequence parallelism)."""
        self.statistic = statistic
        self.sequence_group = sequence_group
        self.sums: Tensor | None = None

    def add(self, activations: Tensor, mask: Tensor) -> None:
        """activations: [s, b, units]; mask: [b, s over all ranks], true where a position counts.

        Collective over `sequence_group`, where there is one.
        """
        per_sample = self._over_positions(activations.detach(), mask).double()
        counted = mask.any(dim=1).double()
        moments = torch.stack(
            [counted @ per_sample, counted @ per_sample.square(), counted.sum().expand(per_sample.shape[1])]
        )
        self.sums = moments if self.sums is None else self.sums + moments

    def _over_positions(self, activations: Tensor, mask: Tensor) -> Tensor:
        """The sequence reduction: fp32 [b, units]."""
        a, length = activations.float(), mask.sum(1).clamp(min=1).unsqueeze(1)
        if not bool(mask.all()):
            mine = (
                mask.t()
                if self.sequence_group is None
                else mask.t().chunk(group_size(self.sequence_group))[group_rank(self.sequence_group)]
            )
            a = a * mine.unsqueeze(-1)
        if self.statistic.sequence == "mean":
            return self._shared(a.abs().sum(0)) / length
        squares = self._shared(a.square().sum(0, dtype=torch.float64))
        if self.statistic.sequence == "l2":
            return squares.sqrt()
        mean = self._shared(a.sum(0, dtype=torch.float64)) / length
        return (squares / length - mean.square()).clamp(min=0)

    def _shared(self, sums: Tensor) -> Tensor:
        return sums if self.sequence_group is None else all_reduce(sums, self.sequence_group)

    def result(self, data_group: Group) -> Tensor:
        """The batch reduction over all data-parallel ranks' samples: fp64 [units]. Collective over `data_group`."""
        assert self.sums is not None, "a tap saw no activation"
        total, squares, samples = all_reduce(self.sums.clone(), data_group)
        if self.statistic.batch == "l2":
            return squares.sqrt()
        mean = total / samples
        return mean if self.statistic.batch == "mean" else (squares / samples - mean.square()).clamp(min=0)
