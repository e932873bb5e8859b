"""All process-wide patches of torch: with them megatron-core, which asks for CUDA, runs on the CPU.

Each names the line of mcore that needs it; `tests/parallel/test_patches.py` shows what fails without it. mcore asks for
CUDA by device argument, by `.cuda()` and by type name, which a TorchFunctionMode answers for tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from .patch import patch, patched

__all__ = ["patch_torch", "uncompiled"]

CPU = torch.device("cpu")

T = TypeVar("T")


def patch_torch() -> None:
    """Install the patches; call it once per process, before mcore is imported."""
    _CudaIsCpu().__enter__()
    patch(torch.cuda, "current_device", lambda: CPU)  # tensor_parallel/layers.py:552 and fifty more
    patch(torch.cuda, "synchronize", lambda *args, **kwargs: None)  # dist_checkpointing/strategies/async_utils.py:212
    patch(torch.cuda, "current_stream", lambda *args, **kwargs: None)  # 0.19: distributed/param_and_grad_buffer.py:632
    patch(torch.cuda, "manual_seed", torch.manual_seed)  # tensor_parallel/random.py:237
    patch(torch.cuda, "get_rng_state", lambda *args, **kwargs: torch.get_rng_state())  # random.py:235 and 238


def _on_cpu(device: T) -> T | torch.device:
    """Return the CPU for any spelling of a CUDA device, and anything else unchanged."""
    if isinstance(device, int) and not isinstance(device, bool):
        return CPU
    if isinstance(device, (str, torch.device)) and str(device).startswith("cuda"):
        return CPU
    return device


class _CudaIsCpu(TorchFunctionMode):
    """Rewrite CUDA devices in factory calls, `.cuda()`, `.to()` and `.type()`."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if "device" in kwargs:  # optimizer/clip_grads.py:90, optimizer/optimizer.py:473, tensor_parallel/mappings.py:91
            kwargs = {**kwargs, "device": _on_cpu(kwargs["device"])}
        if func is torch.Tensor.cuda:  # language_module/language_module.py:261, tensor_parallel/data.py:84
            return args[0]
        if func is torch.Tensor.to and len(args) > 1:
            args = (args[0], *(a if isinstance(a, torch.Tensor) else _on_cpu(a) for a in args[1:]))
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # optimizer/distrib_optimizer.py:361 accepts only "torch.cuda.*Tensor" type names
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


@contextmanager
def uncompiled() -> Iterator[None]:
    """Make torch.compile a no-op decorator inside the block.

    mcore decorates its fusions with it (jit.py). None of them runs here, and the first use of torch.compile takes two
    seconds of imports.
    """
    with patched(torch, "compile", lambda function=None, **_: function or (lambda wrapped: wrapped)):
        yield
