"""Model of a GPU's time: the larger one of an operation's computing and its memory traffic. Not a measurement."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..gpus import Gpu

__all__ = ["ASSUMED", "Clock"]

MATMUL, MATMUL_FP32, BANDWIDTH, LINK = 0.7, 0.8, 0.85, 0.73
"""Shares of the data sheet's peaks that matrix products, memory and links are taken to reach."""
ATTENTION, CUDNN_ATTENTION = (0.34, 0.29), (0.53, 0.46)
"""The same of attention by torch's own kernels and by cuDNN's, forward and backward: on an H100 with causal attention,
heads of 128 and 8,192 tokens (FlashAttention-3, arXiv 2407.08608, Figures 5 and 6; backward is printed without the
causal mask, and is taken to lose by it what forward loses)."""
NETWORK = 45e9
"""Bytes per second and GPU between nodes: nine tenths of a 400 Gb/s adapter for each GPU."""
LAUNCH, MESSAGE = 3e-6, 15e-6
"""Least seconds of a kernel and of a collective."""
NODE = 8
"""GPUs that are connected by links; a larger group goes over the network."""

ASSUMED = (
    f"Modelled, not measured: {MATMUL:.0%} of the data sheet's peak for matrix products, {ATTENTION[0]:.0%} and "
    f"{ATTENTION[1]:.0%} for attention forward and backward ({CUDNN_ATTENTION[0]:.0%} and {CUDNN_ATTENTION[1]:.0%} by "
    f"cuDNN, on H100, H200 and B200), {BANDWIDTH:.0%} of the memory's bandwidth, "
    f"{LINK:.0%} of the links' in groups of up to {NODE}, {NETWORK / 1e9:.0f} GB/s a GPU between nodes; only "
    "collectives that are started early overlap with computing. Speeds in bf16 that others published are 1.3 to 1.9 "
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
            share = (CUDNN_ATTENTION if "cudnn" in name else ATTENTION)["backward" in name]
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
