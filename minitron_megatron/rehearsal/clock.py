"""Model of a GPU's time: the larger one of an operation's computing and its memory traffic. Not a measurement."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..gpus import Gpu

__all__ = ["ASSUMED", "Clock"]

MATMUL, MATMUL_FP32, ATTENTION, ATTENTION_BACKWARD, BANDWIDTH, LINK = 0.7, 0.8, 0.38, 0.3, 0.85, 0.73
"""Shares of the data sheet's peaks that matrix products, flash attention, memory and links are taken to reach."""
NETWORK = 45e9
"""Bytes per second and GPU between nodes: nine tenths of a 400 Gb/s adapter for each GPU."""
LAUNCH, MESSAGE = 3e-6, 15e-6
"""Least seconds of a kernel and of a collective."""
NODE = 8
"""GPUs that are connected by links; a larger group goes over the network."""

ASSUMED = (
    f"Modelled, not measured: {MATMUL:.0%} of the data sheet's peak for matrix products, {ATTENTION:.0%} and "
    f"{ATTENTION_BACKWARD:.0%} for attention forward and backward, {BANDWIDTH:.0%} of the memory's bandwidth, "
    f"{LINK:.0%} of the links' in groups of up to {NODE}, {NETWORK / 1e9:.0f} GB/s a GPU between nodes; only "
    "collectives that are started early overlap with computing. Speeds in bf16 that others published are 1.2 to 1.6 "
    "times lower than this model gives."
)
"""The last sentence is what `benchmarks/rehearse_published.py` found."""


@dataclass(frozen=True)
class Clock:
    """Seconds of operations on one GPU."""

    gpu: Gpu

    def operation(self, name: str, flops: float, touched: float, dtype: torch.dtype) -> tuple[str, float]:
        """Return (resource that takes most of the time, seconds) of a kernel."""
        half = dtype in (torch.bfloat16, torch.float16)
        full = self.gpu.fp64_flops if dtype == torch.float64 and self.gpu.fp64_flops else self.gpu.fp32_flops
        if "attention" in name:
            share = ATTENTION_BACKWARD if "backward" in name else ATTENTION
            resource, busy = "attention", flops / (share * (self.gpu.flops if half else full))
        elif flops:
            resource = "matmul"
            busy = flops / (MATMUL * self.gpu.flops if half else MATMUL_FP32 * full)
        else:
            resource, busy = "memory", 0.0
        return resource, max(busy, touched / (BANDWIDTH * self.gpu.bandwidth), LAUNCH)

    def collective(self, name: str, sent: float, ranks: int) -> float:
        """Return the seconds of a collective by rings over `ranks` ranks. sent: bytes of the whole tensor."""
        rate = LINK * self.gpu.link if ranks <= NODE else NETWORK
        turns = 2 if name == "allreduce" else 1
        return max(turns * sent * (ranks - 1) / ranks / rate, MESSAGE)
