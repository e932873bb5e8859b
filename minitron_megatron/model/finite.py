"""Check that numbers are finite."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import CheckpointError, MinitronError
from ..parallel import fail_together
from .chunk import Model, chunks_of

__all__ = ["are_finite", "check_finite"]


def are_finite(tensors: Sequence[Tensor]) -> Tensor:
    """Return whether each of one or more tensors, none of them empty, is finite: bool [tensors].

    Reads each tensor once and holds no copy of it, as `isfinite` would: of fp32 numbers, 7 bytes each.
    """
    ends = torch.stack([torch.stack(tensor.aminmax()).float() for tensor in tensors])  # NaN wins in both
    return ends.isfinite().all(1)


def check_finite(model: Model, what: str, advice: str = "", error: type[MinitronError] = CheckpointError) -> None:
    """Raise `error` where a weight of `model` is not finite; it names `what`, the first such parameter, and `advice`.

    Reads each weight once and holds no copy of it. Collective over the world.
    """
    with fail_together():
        named = [pair for chunk in chunks_of(model) for pair in chunk.named_parameters() if pair[1].numel()]
        if not named:
            return
        broken = (~are_finite([weight.detach() for _, weight in named])).nonzero().flatten().tolist()
        if broken:
            more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
            where = f"{named[broken[0]][0]}{more}"
            raise error(f"{what} has weights that are not finite, in {where}. {advice}".strip())
