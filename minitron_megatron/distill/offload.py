"""Keep a frozen model in host memory while it does not run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..model import Chunk, output_weight
from ..parallel import Topology

__all__ = ["Offload"]


class Offload:
    """Host copy of a frozen model's weights, pinned if there is an accelerator.

    The output layer stays on the device, because the loss reads it. On a CPU nothing moves.
    """

    def __init__(self, chunks: Sequence[Chunk], topology: Topology) -> None:
        self.device = topology.device
        stays = {id(output_weight(chunks[-1]))} if topology.is_last_stage else set()
        every = [weight for chunk in chunks for weight in chunk.parameters()]
        self.host: dict[nn.Parameter, Tensor] = {
            weight: _in_host(weight.data) for weight in every if id(weight) not in stays
        }
        """Offloaded weight -> its tensor in host memory."""
        self._unload()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Hold the weights on the device inside the context. They are frozen, so nothing is copied back."""
        for weight, host in self.host.items():
            weight.data = host.to(self.device, non_blocking=True)
        try:
            yield
        finally:
            self._unload()

    def _unload(self) -> None:
        for weight, host in self.host.items():
            weight.data = host


def _in_host(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor)
