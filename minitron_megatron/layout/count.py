"""Parameter, byte and FLOP counts of a shape, computed from the layout table without building a model."""

from __future__ import annotations

from math import prod

from .shape import Shape
from .table import expert_of, layer_of, lookup

__all__ = ["active_parameters", "flops_per_token", "kv_cache_bytes", "parameters"]


def parameters(shape: Shape) -> int:
    """Return the parameter count of a shape: vocabulary unpadded, a tied embedding counted once."""
    return sum(_weights(shape).values())


def active_parameters(shape: Shape) -> int:
    """Return the parameters active for one token: of the experts, as many as the router selects."""
    return sum(_active(shape).values())


def _weights(shape: Shape) -> dict[str, int]:
    """Return parameter name -> count; the first layer's entries stand for all layers, which are identical."""
    sizes, first = shape.sizes(padded=False), shape.resized(layers=1)
    return {
        name: prod(lookup(name).shape(sizes)) * (1 if layer_of(name) is None else shape.layers)
        for name in first.names()
    }


def _active(shape: Shape) -> dict[str, int]:
    return {name: n for name, n in _weights(shape).items() if (expert_of(name) or 0) < max(shape.experts_per_token, 1)}


def kv_cache_bytes(shape: Shape, batch: int, context: int, bytes_per_number: int = 2) -> int:
    """Return the bytes of the KV cache for `batch` sequences of `context` tokens."""
    return 2 * shape.layers * shape.kv_groups * shape.head_dim * batch * context * bytes_per_number


def flops_per_token(shape: Shape, sequence: int) -> int:
    """Return the FLOPs per token of a forward pass: two per matrix weight, plus causal attention over `sequence`.

    A backward pass costs twice as much. Norms, softmax and the embedding lookup are not counted.
    """
    matrices = sum(n for name, n in _active(shape).items() if len(lookup(name).dims) == 2)
    if not shape.tied:  # the lookup costs nothing; a tied matrix is multiplied once, in the output layer
        matrices -= shape.vocab * shape.hidden
    attention = 2 * shape.layers * shape.heads * shape.head_dim * sequence  # q.k and p.v, halved by causality
    return 2 * matrices + attention
