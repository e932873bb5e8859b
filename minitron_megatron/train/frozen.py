"""Which parameters train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..model import chunks_of, named_shards

__all__ = ["freeze_but", "train_norms_only"]


def train_norms_only(model: Any) -> None:
    """Freezes all parameters of an unwrapped `model` but the norms' weights and biases, in place."""
    freeze_but(model, lambda name: "norm" in name)


def freeze_but(model: Any, trains: Callable[[str], bool]) -> None:
    """Freezes the parameters of an unwrapped `model` whose names `trains` does not want, in place."""
    for chunk in chunks_of(model):
        for shard in named_shards(chunk):
            shard.tensor.requires_grad_(trains(shard.name))
        if chunk.pre_process:
            chunk.embedding.register_forward_hook(_wants_grad)


def _wants_grad(module: nn.Module, inputs: Any, states: Tensor) -> Tensor:
    """A recomputed layer whose input wants no gradient would have none at all: it is an autograd Function of it."""
    return states if states.requires_grad else states.requires_grad_()
