"""Freezing of parameters."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from ..model import Model, chunks_of, named_shards

__all__ = ["freeze_but", "train_norms_only"]


def train_norms_only(model: Model) -> None:
    """Freeze all parameters of an unwrapped `model` except the norms' weights and biases, in place."""
    freeze_but(model, lambda name: "norm" in name)


def freeze_but(model: Model, trains: Callable[[str], bool]) -> None:
    """Freeze the parameters of an unwrapped `model` for whose name `trains` returns false, in place."""
    for chunk in chunks_of(model):
        for shard in named_shards(chunk):
            shard.tensor.requires_grad_(trains(shard.name))
        if chunk.pre_process:
            chunk.embedding.register_forward_hook(_require_grad)


def _require_grad(module: nn.Module, inputs: object, states: Tensor) -> Tensor:
    """Make the embedding's output require a gradient.

    A recomputed layer is an autograd Function of its input: if the input needs no gradient, its weights get none.
    """
    return states if states.requires_grad else states.requires_grad_()
