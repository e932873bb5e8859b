"""Peaks of GPUs, by their data sheets, and what share of them a run is taken to reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["GPUS", "MFU", "Gpu", "gpu_of_name"]

MFU = 0.45
"""Model FLOPs utilisation that estimates assume: about what the presets of `examples` reach when they are rehearsed.
Modelled, not measured."""


@dataclass(frozen=True)
class Gpu:
    """Peaks of one GPU."""

    flops: float
    """Dense bf16 FLOPs per second."""
    bandwidth: float
    """Bytes of its memory per second."""
    fp32_flops: float
    """fp32 FLOPs per second, without TF32."""
    link: float
    """Bytes per second that it sends to another GPU of its machine: NVLink, or PCIe where it has none."""
    capability: tuple[int, int]
    """CUDA's compute capability, by which torch chooses kernels."""
    fp64_flops: float | None = None
    """FP64 FLOPs per second in matrix products, where a cost depends on them."""


GPUS: Mapping[str, Gpu] = {
    "A100": Gpu(312e12, 2.039e12, 19.5e12, 300e9, (8, 0)),
    "L40S": Gpu(362e12, 0.864e12, 91.6e12, 32e9, (8, 9)),
    "H100 PCIe": Gpu(756e12, 2.0e12, 51e12, 64e9, (9, 0)),
    "H100": Gpu(989e12, 3.35e12, 67e12, 450e9, (9, 0), 67e12),
    "H200": Gpu(989e12, 4.8e12, 67e12, 450e9, (9, 0)),
    "B200": Gpu(2250e12, 8.0e12, 75e12, 900e9, (10, 0)),
}
"""GPU -> its peaks: the SXM version, and of the A100 the one with 80 GB, unless the name says another."""


def gpu_of_name(name: str) -> Gpu | None:
    """Return the GPU whose name occurs in what its driver calls it, the longest that fits; None for an unknown one."""
    found = max((known for known in GPUS if known in name), key=len, default=None)
    return None if found is None else GPUS[found]
