"""What a shape weighs and costs, counted from the table with no model built."""

from __future__ import annotations

from math import prod

from .shape import Shape
from .table import lookup

__all__ = ["flops_per_token", "kv_cache_bytes", "parameters"]


def parameters(shape: Shape) -> int:
    """Parameters of a shape, vocabulary unpadded, a tied embedding counted once."""
    sizes = shape.sizes(padded=False)
    return sum(prod(lookup(name).shape(sizes)) for name in shape.names())


def kv_cache_bytes(shape: Shape, batch: int, context: int, bytes_per_number: int = 2) -> int:
    """Bytes of keys and values for `batch` sequences of `context` tokens."""
    return 2 * shape.layers * shape.kv_groups * shape.head_dim * batch * context * bytes_per_number


def flops_per_token(shape: Shape, sequence: int) -> int:
    """FLOPs of one forward pass a token: two for each weight of a matrix product, and causal attention over `sequence`.

    A backward pass costs twice as much. Norms, softmax and the embedding look-up are left out.
    """
    sizes = shape.sizes(padded=False)
    matrices = sum(prod(lookup(name).shape(sizes)) for name in shape.names() if len(lookup(name).dims) == 2)
    if not shape.tied:  # the look-up costs nothing; a tied matrix is multiplied once, by the output layer
        matrices -= shape.vocab * shape.hidden
    attention = 2 * shape.layers * shape.heads * shape.head_dim * sequence  # q.k and p.v, half of each by causality
    return 2 * matrices + attention
