"""All process-wide patches of torch: with them megatron-core, which asks for CUDA, runs on the CPU.

Each names the line of mcore that needs it; `tests/parallel/test_patches.py` shows what fails without it. mcore asks for
CUDA by device argument, by `.cuda()` and by type name. The functions that it calls so are replaced one by one: a
TorchFunctionMode sees every operation, and took a quarter of a small model's time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from .patch import patch, patched

__all__ = ["patch_torch", "uncompiled"]

CPU = torch.device("cpu")
FACTORIES = (
    *("arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "ones", "ones_like"),
    *("rand", "rand_like", "randint", "randn", "randn_like", "randperm", "tensor", "zeros", "zeros_like"),
)
"""Functions of torch that take a device: optimizer/clip_grads.py:90, optimizer/optimizer.py:473 and thirty more."""

T = TypeVar("T")
P = ParamSpec("P")


def patch_torch() -> None:
    """Install the patches; call it once per process, before mcore is imported."""
    with CPU:  # `with torch.device(...)` lists torch's factories at its first use: the originals, which it will meet
        torch.empty(0)
    for name in FACTORIES:
        patch(torch, name, _on_cpu(getattr(torch, name)))
    patch(Tensor, "to", _to_cpu(Tensor.to))  # optimizer/cpu_offloading/hybrid_optimizer.py:367
    patch(Tensor, "cuda", lambda tensor, *_, **__: tensor)  # language_module/language_module.py:261
    patch(Tensor, "type", _with_cuda_names(Tensor.type))  # optimizer/distrib_optimizer.py:361
    patch(torch.cuda, "current_device", lambda: CPU)  # tensor_parallel/layers.py:552 and fifty more
    patch(torch.cuda, "synchronize", lambda *args, **kwargs: None)  # dist_checkpointing/strategies/async_utils.py:212
    patch(torch.cuda, "current_stream", lambda *args, **kwargs: None)  # 0.19: distributed/param_and_grad_buffer.py:632
    patch(torch.cuda, "manual_seed", torch.manual_seed)  # tensor_parallel/random.py:237
    patch(torch.cuda, "get_rng_state", lambda *args, **kwargs: torch.get_rng_state())  # random.py:235 and 238


def _on_cpu(function: Callable[P, T]) -> Callable[P, T]:
    """Return a function that takes the CPU for its argument `device`, where that is a CUDA device."""

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        if "device" in kwargs:
            kwargs["device"] = _device(kwargs["device"])
        return function(*args, **kwargs)

    return wrapper


def _to_cpu(to: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `Tensor.to` with the CPU for a CUDA device, which is any of its arguments."""
    to = _on_cpu(to)
    return lambda tensor, *args, **kwargs: to(tensor, *map(_device, args), **kwargs)


def _with_cuda_names(type_: Callable[..., str]) -> Callable[..., str]:
    """Return `Tensor.type` with "torch.cuda.FloatTensor" for "torch.FloatTensor": mcore knows only the former."""
    return lambda tensor, *to, **kwargs: (
        type_(tensor, *to, **kwargs) if to or kwargs else type_(tensor).replace("torch.", "torch.cuda.")
    )


def _device(argument: object) -> object:
    """Return the CPU for any spelling of a CUDA device, and anything else unchanged."""
    if isinstance(argument, int) and not isinstance(argument, bool):
        return CPU
    if isinstance(argument, (str, torch.device)) and str(argument).startswith("cuda"):
        return CPU
    return argument


@contextmanager
def uncompiled() -> Iterator[None]:
    """Make torch.compile a no-op decorator inside the block.

    mcore decorates its fusions with it (jit.py). None of them runs here, and the first use of torch.compile takes two
    seconds of imports.
    """
    with patched(torch, "compile", lambda function=None, **_: function or (lambda wrapped: wrapped)):
        yield
