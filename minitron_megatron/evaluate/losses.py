"""Loss on held-out text, per source and over all sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..data import Batch
from ..model import Model, evaluating
from ..parallel import Topology
from ..train import LMObjective, Objective, mean_loss

__all__ = ["ValidationSet", "validation_loss"]

ValidationSet = Mapping[str, Sequence[Batch]]
"""Source -> this data-parallel rank's micro-batches."""


def validation_loss(
    model: Model, held_out: ValidationSet, topology: Topology, objective: Objective | None = None
) -> dict[str, float]:
    """Return nats per token of each source, and over all tokens as `all`. Collective over the world.

    objective: the loss to measure; default: cross-entropy.
    """
    with evaluating(model):
        sums = {
            source: mean_loss(model, batches, objective or LMObjective(topology), topology)
            for source, batches in held_out.items()
        }
    tokens = sum(count for _, count in sums.values())
    total = sum(loss * count for loss, count in sums.values()) / max(tokens, 1)
    return {source: loss for source, (loss, _) in sums.items()} | {"all": total}
