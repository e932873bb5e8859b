"""Keys and values of the tokens that a model has read, so that only the next ones have to run."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["DecodeBatch", "KVCache"]


class KVCache:
    """Of one micro-batch, whose rows may be of unlike lengths, at each of this rank's layers.

    It weighs 2 x layers x batch x kv_groups (over tp) x room x head_dim numbers.
    """

    def __init__(self, rows: int, room: int) -> None:
        """room: the most tokens that a row will have."""
        self.room = room
        self.starts = torch.zeros(rows, dtype=torch.int64)
        """Where the next tokens of each row go; on the host."""
        self._held: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def positions(self, tokens: Tensor) -> Tensor:
        """int64 [batch, seq], of tokens that come next; on the host."""
        return self.starts[:, None] + torch.arange(tokens.shape[1])

    def extend(
        self, layer: nn.Module, key: Tensor, value: Tensor, window: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Takes in a layer's keys and values, [batch, kv_groups, seq, head_dim], from `starts` on.

        Returns all keys and values so far, and which of them each new token sees, within a window where there is one:
        bool [batch, 1, seq, all], or None, which means causal. What a row held from there on is gone.
        """
        if not self.starts.any():
            self._held[layer] = tuple(_roomy(each, self.room) for each in (key, value))  # type: ignore[assignment]
            return key, value, None
        at = self.positions(key[:, 0]).to(key.device)
        keys, values = self._held[layer]
        rows = torch.arange(len(at), device=key.device)[:, None]
        keys[rows, :, at], values[rows, :, at] = key.transpose(1, 2), value.transpose(1, 2)
        end = int(self.starts.max()) + key.shape[2]
        places = torch.arange(end, device=key.device)
        seen = places <= at[..., None]
        if window:
            seen &= places > at[..., None] - window
        return keys[:, :, :end], values[:, :, :end], seen[:, None]


def _roomy(part: Tensor, room: int) -> Tensor:
    whole = part.new_zeros((*part.shape[:2], room, part.shape[3]))
    whole[:, :, : part.shape[2]] = part
    return whole


@dataclass(frozen=True)
class DecodeBatch:
    """A micro-batch of what follows `beside`: tokens, int64 [batch, seq]. `mask` counts nothing: there is no loss."""

    tokens: Tensor
    beside: KVCache

    @property
    def mask(self) -> Tensor:
        return torch.zeros_like(self.tokens, dtype=torch.bool)
