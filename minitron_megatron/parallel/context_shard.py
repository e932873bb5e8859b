"""Context parallelism: which part of each sequence a rank has, and how attention sees the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, pairwise
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .collectives import Group, gather_sequence, scatter_sequence

__all__ = ["ContextShard"]

Piece = tuple[int, int, int]
"""First query, end of them, first key that they see: positions."""

_NUMBERS = count()
_SHARDS: WeakValueDictionary[int, ContextShard] = WeakValueDictionary()


@dataclass(frozen=True)
class ContextShard:
    """Of `size` ranks that share each sequence, the part of rank `rank`: of 2 x size equal chunks the one of its number
    and the one as far from the end, so that causal attention is the same work for all."""

    rank: int
    size: int
    group: Group
    sequence: int
    documents: Tensor | None = None
    """int64 [batch, sequence] on the host: the number of each token's document, which attention does not leave."""

    @cached_property
    def ticket(self) -> Tensor:
        """A number under which `of` finds it while it lives: mcore's recomputation of layers carries tensors alone."""
        number = next(_NUMBERS)
        _SHARDS[number] = self
        return torch.tensor(number)

    @staticmethod
    def of(ticket: Tensor) -> ContextShard:
        return _SHARDS[int(ticket)]

    @property
    def chunk(self) -> int:
        return self.sequence // (2 * self.size)

    def _starts(self, rank: int) -> tuple[int, int]:
        return rank * self.chunk, (2 * self.size - 1 - rank) * self.chunk

    def take(self, whole: Tensor) -> Tensor:
        """This rank's part of dim 1 of whole sequences."""
        return torch.cat([whole.narrow(1, start, self.chunk) for start in self._starts(self.rank)], 1)

    def positions(self, tokens: Tensor) -> Tensor:
        """int64 [1, part of the sequence], of this rank's tokens in it; on the host."""
        return self.take(torch.arange(self.sequence)[None])

    def whole(self, part: Tensor) -> Tensor:
        """Dim 0 of every rank's part as the whole sequence, on every rank; a gradient is summed over the ranks.
        Collective over the group, backward too."""
        gathered: Tensor = _Whole.apply(part, self)
        return gathered

    @cached_property
    def pieces(self) -> list[list[Piece]]:
        """Of each sample, or once where all are one document, the pieces of this rank's part, in its order: its chunks,
        or what of them belongs to one document."""
        if self.documents is None:
            return [list(self._cut([0]))]
        return [list(self._cut([0, *(each.diff().nonzero().flatten() + 1).tolist()])) for each in self.documents]

    def _cut(self, begins: Sequence[int]) -> Iterator[Piece]:
        """begins: of documents."""
        for start in self._starts(self.rank):
            end = start + self.chunk
            for a, b in pairwise([start, *(begin for begin in begins if start < begin < end), end]):
                yield a, b, max(begin for begin in begins if begin <= a)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, span: ContextShard) -> Tensor:
        ctx.span = span
        return in_order(gather_sequence(part, span.group), span.size)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return scatter_sequence(by_rank(gradient, ctx.span.size), ctx.span.group), None


def in_order(parts: Tensor, size: int) -> Tensor:
    """Dim 0 of the ranks' parts, one after the other, as the sequence has it."""
    early, late = parts.unflatten(0, (size, 2, -1)).unbind(1)
    return torch.cat([early, late.flip(0)]).flatten(0, 1)


def by_rank(whole: Tensor, size: int) -> Tensor:
    """The inverse of `in_order`."""
    early, late = whole.unflatten(0, (2, size, -1))
    return torch.stack([early, late.flip(0)], 1).flatten(0, 2)
