"""Functions of tensors that torch.compile makes one kernel of on a GPU; on a CPU they run as they are written."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor

__all__ = ["compiled", "one_kernel", "rotated"]

P = ParamSpec("P")
R = TypeVar("R")


def one_kernel(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function whose first argument is a tensor: on a GPU it is compiled, for any sizes.

    It may not need autograd or other ranks, and returns every tensor that it writes to.
    """

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        on_gpu = isinstance(args[0], Tensor) and args[0].is_cuda
        return (compiled(function) if on_gpu else function)(*args, **options)

    return call


@cache
def compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Return a function as torch compiles it, at its first call and once a process."""
    return torch.compile(function, dynamic=True)


class _Context(Protocol):
    """Autograd's context, from the forward to the backward pass."""

    rotate: Callable[..., Tensor]
    options: dict[str, object]
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context, rotate: Callable[..., Tensor], states: Tensor, angles: Tensor, options: dict[str, object]
    ) -> Tensor:
        ctx.rotate, ctx.options = rotate, options
        ctx.save_for_backward(angles)
        return rotate(states, angles, **options)

    @staticmethod
    def backward(ctx: _Context, *upstream: Tensor) -> tuple[None, Tensor, None, None]:
        [angles] = ctx.saved_tensors
        return None, ctx.rotate(upstream[0], -angles, **ctx.options), None, None


def rotated(rotate: Callable[..., Tensor], states: Tensor, angles: Tensor, **options: object) -> Tensor:
    """Return `rotate(states, angles, **options)`, whose gradient is the rotation of the upstream one by -angles.

    rotate: mcore's plain function of rotary embeddings, or a compiled one. Only the angles are kept for backward.
    """
    return _Rotated.apply(rotate, states, angles, options)
