"""A frozen model that lies in host memory while it does not run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..model import output_weight
from ..parallel import Topology

__all__ = ["Offload"]


class Offload:
    """Moves the weights of a frozen model to host memory, pinned where there is an accelerator; the output layer, which
    the loss reads, stays. On a CPU nothing moves."""

    def __init__(self, chunks: Sequence[Any], topology: Topology) -> None:
        self.device = topology.device
        stays = {id(output_weight(chunks[-1]))} if topology.is_last_stage else set()
        every = [weight for chunk in chunks for weight in chunk.parameters()]
        self.home: dict[nn.Parameter, Tensor] = {
            weight: _in_host(weight.data) for weight in every if id(weight) not in stays
        }
        """Where each weight that moves lies in host memory."""
        self._leave()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside, the weights are where the model runs. They are frozen, so that nothing is copied back."""
        for weight, home in self.home.items():
            weight.data = home.to(self.device, non_blocking=True)
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        for weight, home in self.home.items():
            weight.data = home


def _in_host(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor
    home = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return home.copy_(tensor)
