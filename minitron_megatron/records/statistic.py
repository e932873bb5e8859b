"""How activations add up to one number per unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Literal, Protocol

import torch
from torch import Tensor

from ..registry import Registry
from ..settings import AfterValidator, Field, Settings

__all__ = ["REDUCTIONS", "Reduction", "Statistic"]

Total = Callable[..., Tensor]
"""(numbers, dtype of the sum) -> their sum over positions, on all ranks that share these."""


class Reduction(Protocol):
    """Reduction of many numbers to one, over the positions of a sample or over samples (a plugin point)."""

    def over_positions(self, activations: Tensor, length: Tensor, total: Total) -> Tensor:
        """Return [samples, units]. length: positions of each sample, [samples, 1]."""
        ...

    def over_samples(self, total: Tensor, squares: Tensor, samples: Tensor) -> Tensor:
        """Return fp64 [units]. total, squares: sums of the samples' numbers and of their squares; samples: how many."""
        ...


class L2:
    """Root of the summed squares."""

    def over_positions(self, activations: Tensor, length: Tensor, total: Total) -> Tensor:
        return total(activations.square(), torch.float64).sqrt()

    def over_samples(self, total: Tensor, squares: Tensor, samples: Tensor) -> Tensor:
        return squares.sqrt()


class Mean:
    """Mean: over positions of absolute values, over samples of plain ones."""

    def over_positions(self, activations: Tensor, length: Tensor, total: Total) -> Tensor:
        return total(activations.abs()) / length

    def over_samples(self, total: Tensor, squares: Tensor, samples: Tensor) -> Tensor:
        return total / samples


class Variance:
    """Population variance."""

    def over_positions(self, activations: Tensor, length: Tensor, total: Total) -> Tensor:
        squares, mean = total(activations.square(), torch.float64), total(activations, torch.float64) / length
        return (squares / length - mean.square()).clamp(min=0)

    def over_samples(self, total: Tensor, squares: Tensor, samples: Tensor) -> Tensor:
        return (squares / samples - (total / samples).square()).clamp(min=0)


REDUCTIONS: Registry[Reduction] = Registry("statistic", {"l2": L2(), "mean": Mean(), "var": Variance()})

ReductionName = Annotated[str, AfterValidator(REDUCTIONS.known), Field(examples=[*REDUCTIONS])]


class Statistic(Settings):
    """How activations are aggregated into an importance score: first over the positions of a sample, then over samples
    (Minitron, section 2.2). The defaults are the papers' choice."""

    batch: ReductionName = "l2"
    """Aggregation over samples: l2, mean or var (population variance)."""
    sequence: ReductionName = "mean"
    """Aggregation over the positions of a sample, done first: l2, mean (of absolute values) or var."""
    neurons: Literal["post", "pre"] = "post"
    """Point at which MLP neurons are measured: `post`, after the activation and the gate; `pre`, before the activation
    (not possible for a gated MLP)."""
    heads: Literal["norm_last", "norm_first"] = "norm_last"
    """When the L2 norm over a head's channels is taken: `norm_last`, after aggregation (as in ModelOpt); `norm_first`,
    at each position (as printed in the paper)."""

    @classmethod
    def recorded(cls, names: Mapping[str, str]) -> Statistic:
        """Return the statistic of a scores file; its reductions may be those of a plugin that is not imported."""
        foreign = {key: names[key] for key in ("batch", "sequence") if names[key] not in REDUCTIONS}
        known = {key: name for key, name in names.items() if key not in foreign}
        return cls.model_validate(known).model_copy(update=foreign)
