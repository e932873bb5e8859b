"""Check that a model's weights are finite."""

from __future__ import annotations

import torch

from ..errors import CheckpointError, MinitronError
from ..parallel import fail_together
from .chunk import Model, chunks_of

__all__ = ["check_finite"]


def check_finite(model: Model, what: str, advice: str = "", error: type[MinitronError] = CheckpointError) -> None:
    """Raise `error` where a weight of `model` is not finite; it names `what`, the first such parameter, and `advice`.

    Reads each weight once and holds no copy of it. Collective over the world.
    """
    with fail_together():
        named = [pair for chunk in chunks_of(model) for pair in chunk.named_parameters() if pair[1].numel()]
        if not named:
            return
        ends = torch.stack([torch.stack(weight.detach().aminmax()).float() for _, weight in named])  # NaN wins in both
        broken = (~ends.isfinite().all(1)).nonzero().flatten().tolist()
        if broken:
            more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
            where = f"{named[broken[0]][0]}{more}"
            raise error(f"{what} has weights that are not finite, in {where}. {advice}".strip())
