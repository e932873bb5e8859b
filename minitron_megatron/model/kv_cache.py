"""KV cache for incremental decoding with our core attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..parallel import AttentionContext

__all__ = ["DecodeBatch", "KVCache"]


class KVCache:
    """KV cache of one micro-batch for this rank's layers; rows may differ in length.

    It holds 2 x layers x batch x kv_groups (over tp) x room x head_dim numbers.
    """

    def __init__(self, rows: int, room: int) -> None:
        """room: maximum number of tokens of a row."""
        self.room = room
        self.starts = torch.zeros(rows, dtype=torch.int64)
        """Position of each row's next token: int64 [rows], on the host."""
        self._held: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def positions(self, tokens: Tensor) -> Tensor:
        """Return the positions of the next tokens: int64 [batch, seq], on the host."""
        return self.starts[:, None] + torch.arange(tokens.shape[1])

    def extend(
        self, layer: nn.Module, key: Tensor, value: Tensor, window: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store a layer's keys and values, [batch, kv_groups, seq, head_dim], at `starts`, and overwrite later entries.

        Return (keys, values, mask): all keys and values so far, and the ones that each new token attends to, bool
        [batch, 1, seq, all], within `window` if given; mask None means causal.
        """
        if not self.starts.any():
            self._held[layer] = tuple(_padded(each, self.room) for each in (key, value))  # type: ignore[assignment]
            return key, value, None
        at = self.positions(key[:, 0]).to(key.device)
        keys, values = self._held[layer]
        rows = torch.arange(len(at), device=key.device)[:, None]
        keys[rows, :, at], values[rows, :, at] = key.transpose(1, 2), value.transpose(1, 2)
        end = int(self.starts.max()) + key.shape[2]
        places = torch.arange(end, device=key.device)
        mask = places <= at[..., None]
        if window:
            mask &= places > at[..., None] - window
        return keys[:, :, :end], values[:, :, :end], mask[:, None]


def _padded(part: Tensor, room: int) -> Tensor:
    """Return keys or values with room for `room` tokens, zero after the given ones."""
    whole = part.new_zeros((*part.shape[:2], room, part.shape[3]))
    whole[:, :, : part.shape[2]] = part
    return whole


@dataclass(frozen=True)
class DecodeBatch:
    """Micro-batch of the next tokens, int64 [batch, seq], after those in a KV cache. No token has a loss."""

    tokens: Tensor
    attention_context: AttentionContext

    @property
    def mask(self) -> Tensor:
        return torch.zeros_like(self.tokens, dtype=torch.bool)
