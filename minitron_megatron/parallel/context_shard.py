"""Context parallelism: the part of each sequence that a rank holds, and the exchange with the other ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from .collectives import Group, gather_sequence, scatter_sequence

__all__ = ["ContextShard", "Piece"]

Piece = tuple[int, int, int]
"""Positions (first query, end of the queries, first key that they attend to)."""


@dataclass(frozen=True)
class ContextShard:
    """Part of each sequence that rank `rank` of `size` context-parallel ranks holds.

    A sequence has 2 x size equal chunks. Rank r holds chunk r and chunk 2 x size - 1 - r, so that causal attention is
    the same work on every rank.
    """

    rank: int
    size: int
    group: Group
    sequence: int

    @property
    def chunk(self) -> int:
        return self.sequence // (2 * self.size)

    def _starts(self, rank: int) -> tuple[int, int]:
        return rank * self.chunk, (2 * self.size - 1 - rank) * self.chunk

    def take(self, whole: Shaped[Tensor, "batch seq *axes"]) -> Shaped[Tensor, "batch local_seq *axes"]:
        """Return this rank's part of dim 1 of whole sequences."""
        return torch.cat([whole.narrow(1, start, self.chunk) for start in self._starts(self.rank)], 1)

    def positions(self, tokens: Int64[Tensor, "batch local_seq"]) -> Int64[Tensor, "1 local_seq"]:
        """Return the positions of this rank's tokens in the sequence, on the host."""
        return self.take(torch.arange(self.sequence)[None])

    def whole(self, part: Shaped[Tensor, "local_seq *axes"]) -> Shaped[Tensor, "seq *axes"]:
        """Gather the parts (dim 0) of all ranks into the whole sequence, on every rank; gradients are summed over
        ranks.

        Collective over the group, in the backward pass too.
        """
        gathered: Tensor = _Whole.apply(part, self)
        return gathered

    def pieces(self, documents: Int64[Tensor, "batch seq"] | None) -> list[list[Piece]]:
        """Return the pieces of this rank's part in order, for each sample; one list for all without documents.

        documents: document number of each token. A piece is a chunk, or the part of a chunk
        that belongs to one document.
        """
        if documents is None:
            return [list(self._cut([0]))]
        return [list(self._cut([0, *(each.diff().nonzero().flatten() + 1).tolist()])) for each in documents]

    def _cut(self, begins: Sequence[int]) -> Iterator[Piece]:
        """Yield the pieces of this rank's chunks. begins: first positions of the documents."""
        for start in self._starts(self.rank):
            end = start + self.chunk
            for a, b in pairwise([start, *(begin for begin in begins if start < begin < end), end]):
                yield a, b, max(begin for begin in begins if begin <= a)


class _Context(Protocol):
    """Autograd's context, from the forward to the backward pass."""

    shard: ContextShard


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Context, part: Tensor, shard: ContextShard) -> Tensor:
        ctx.shard = shard
        return in_order(gather_sequence(part, shard.group), shard.size)

    @staticmethod
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return scatter_sequence(by_rank(gradient, ctx.shard.size), ctx.shard.group), None


def in_order(parts: Shaped[Tensor, "seq *axes"], size: int) -> Shaped[Tensor, "seq *axes"]:
    """Reorder dim 0 from rank order (the ranks' parts, concatenated) to sequence order."""
    early, late = parts.unflatten(0, (size, 2, -1)).unbind(1)
    return torch.cat([early, late.flip(0)]).flatten(0, 1)


def by_rank(whole: Shaped[Tensor, "seq *axes"], size: int) -> Shaped[Tensor, "seq *axes"]:
    """Reorder dim 0 from sequence order to rank order: the inverse of `in_order`."""
    early, late = whole.unflatten(0, (2, size, -1))
    return torch.stack([early, late.flip(0)], 1).flatten(0, 2)
