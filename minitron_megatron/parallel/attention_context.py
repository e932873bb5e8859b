"""The context of attention: what tokens attend to besides the tokens before them, and its way through mcore."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from .context_shard import ContextShard, Piece

__all__ = ["AttentionContext"]


class Cache(Protocol):
    """Interface of a cache of keys and values, which `model.KVCache` implements."""

    def positions(self, tokens: Int64[Tensor, "batch seq"]) -> Int64[Tensor, "batch seq"]:
        """Return the positions of the next tokens, on the host."""
        ...

    def extend(
        self, layer: nn.Module, key: Tensor, value: Tensor, window: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store a layer's keys and values; return (all keys, all values, mask of each new token)."""
        ...


@dataclass(frozen=True, eq=False)
class AttentionContext:
    """Context of a micro-batch's attention. Without one, each sample is one document, and attention is causal."""

    documents: Int64[Tensor, "batch seq"] | None = None
    """Document number of each token: attention stays within a document. It lies on the host,
    which launches one call per document, so that nothing between documents is computed."""
    cache: Cache | None = None
    """Keys and values of earlier tokens, which the tokens attend to."""
    shard: ContextShard | None = None
    """Part of each sequence that this rank holds, in context parallelism; `documents` are those of whole sequences."""

    def __post_init__(self) -> None:
        assert self.cache is None or (self.documents is None and self.shard is None)

    @property
    def has_varying_shapes(self) -> bool:
        """Whether calls of attention differ in shape from one micro-batch to the next: documents and decoding."""
        return self.documents is not None or self.cache is not None

    def positions(self, tokens: Int64[Tensor, "batch local_seq"]) -> Int64[Tensor, "#batch local_seq"] | None:
        """Return the positions of tokens that do not begin at 0, on the host; else None."""
        held = self.cache or self.shard
        return held.positions(tokens) if held else None

    @cached_property
    def pieces(self) -> list[list[Piece]]:
        """Pieces of this rank's shard; computed once for all layers."""
        assert self.shard is not None
        return self.shard.pieces(self.documents)

    def as_mask(self) -> Tensor:
        """Return a tensor to pass to mcore as its attention mask, which `of` turns back into this context."""
        carrier = torch.empty(0).as_subclass(_Carrier)
        carrier.context = self
        return carrier

    @staticmethod
    def of(attention_mask: Tensor | None) -> AttentionContext:
        """Return the context that mcore passes to attention as its mask."""
        if attention_mask is None:
            return AttentionContext()
        assert isinstance(attention_mask, _Carrier), "attention masks are not supported; give an AttentionContext"
        return attention_mask.context


class _Carrier(Tensor):
    """Empty tensor with an AttentionContext.

    mcore's layers pass their attention mask on unseen, but its activation recomputation saves and detaches it
    (tensor_parallel/random.py, `CheckpointFunction`), as can only be done with tensors.
    """

    context: AttentionContext

    def detach(self) -> _Carrier:
        return self
