"""The device that a process computes on: the CPU backend, and what a GPU reaches."""

from __future__ import annotations

import resource

import torch

from ..gpus import gpu_of_name
from .mcore_patches import patch_mcore, patch_mcore_for_cpu
from .torch_patches import patch_torch, uncompiled

__all__ = ["has_cpu_backend", "install_cpu_backend", "peak_bytes", "peak_flops"]


def peak_bytes() -> int:
    """Return the peak memory of this process so far: GPU memory allocated by torch, or without a GPU its peak RSS."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_flops() -> float | None:
    """Return the peak dense bf16 FLOPs per second of this process's GPU; None on a CPU, or for an unknown GPU."""
    if not torch.cuda.is_available():
        return None
    gpu = gpu_of_name(torch.cuda.get_device_name())
    return gpu.flops if gpu else None


_installed = False


def install_cpu_backend() -> None:
    """Patch mcore and torch so that mcore runs on the CPU, once per process; do nothing where CUDA is present."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    patch_torch()
    with uncompiled():
        patch_mcore_for_cpu()
        patch_mcore()


def has_cpu_backend() -> bool:
    """Return whether `install_cpu_backend` has patched this process, in which `cuda` means the CPU from then on."""
    return _installed
