"""Patches with which megatron-core runs on the CPU with gloo, for the versions in `mcore_compat.FITS`.

mcore requests CUDA by device argument, by `.cuda()` and by type name. A TorchFunctionMode handles all three for
tensors; the other patches are module attributes. Each names the line of mcore that needs it.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ..gpus import gpu_of_name

__all__ = ["install_cpu_backend", "peak_bytes", "peak_flops"]

CPU = torch.device("cpu")


def _on_cpu(device: Any) -> Any:
    """Return the CPU for any spelling of a CUDA device, and anything else unchanged."""
    if isinstance(device, int) and not isinstance(device, bool):
        return CPU
    if isinstance(device, (str, torch.device)) and str(device).startswith("cuda"):
        return CPU
    return device


class _CudaIsCpu(TorchFunctionMode):
    """Rewrite CUDA devices in factory calls, `.cuda()`, `.to()` and `.type()`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs:  # optimizer/clip_grads.py:90, optimizer/optimizer.py:473, tensor_parallel/mappings.py:91
            kwargs = {**kwargs, "device": _on_cpu(kwargs["device"])}
        if func is torch.Tensor.cuda:  # models/common/language_module/language_module.py:261
            return args[0]
        if func is torch.Tensor.to and len(args) > 1:
            args = (args[0], *(a if isinstance(a, torch.Tensor) else _on_cpu(a) for a in args[1:]))
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # optimizer/distrib_optimizer.py:361 accepts only "torch.cuda.*Tensor" type names
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


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


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Make torch.compile a no-op decorator inside the block.

    mcore decorates its fusions with it (jit.py). None of them runs here, and the first use of torch.compile takes two
    seconds of imports.
    """
    before = torch.compile
    torch.compile = lambda function=None, **_: function or (lambda wrapped: wrapped)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = before


_groups: dict[tuple[int, ...], Any] = {}
"""Ranks -> their process group; the empty tuple stands for the world, whose end makes the others invalid."""


def release_groups() -> None:
    """Drop the process groups of a layout that has ended."""
    _groups.clear()


def _share_groups() -> None:
    """Make mcore create one gloo group for each distinct set of ranks, not one for each purpose.

    A layout has some twenty groups, and in a small world most have the same ranks. Each holds three threads, one of
    which wakes a hundred times a second, and takes a rendezvous of the world to create. Every rank issues the
    operations of a set of ranks in the same order, so that one group serves all purposes.
    """
    from megatron.core import parallel_state

    create = parallel_state.create_group

    def create_group(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:  # parallel_state.py:214
        world = torch.distributed.group.WORLD
        if _groups.get(()) is not world:  # a script of the user's may end its world without Topology.stop
            _groups.clear()
            _groups[()] = world
        key = tuple(sorted(ranks or range(torch.distributed.get_world_size())))  # torch sorts them too
        if key not in _groups:
            _groups[key] = create(ranks, *args, **kwargs)
        return _groups[key]

    parallel_state.create_group = create_group


_installed = False


def install_cpu_backend() -> None:
    """Patch mcore and torch so that mcore runs on the CPU, once per process; do nothing where CUDA is present."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    _installed = True
    _CudaIsCpu().__enter__()
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU  # tensor_parallel/layers.py:552 and fifty more
    cuda.synchronize = lambda *args, **kwargs: None  # dist_checkpointing/strategies/async_utils.py
    cuda.current_stream = lambda *args, **kwargs: None  # pipeline_parallel/combined_1f1b.py:408
    cuda.manual_seed = torch.manual_seed  # tensor_parallel/random.py:237
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()  # random.py:55
    cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    with _uncompiled():
        from megatron.core.tensor_parallel import random as mcore_random

        _share_groups()

    mcore_random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()  # random.py:41
    mcore_random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)  # random.py:72
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):  # moe/moe_utils.py uses it, but defines it only where TE is installed
        moe_utils.te_general_gemm = None
