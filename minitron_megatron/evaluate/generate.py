"""Incremental decoding with a KV cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..model import DecodeBatch, KVCache
from ..parallel import AttentionContext, Topology, gather_objects, gather_sequence

__all__ = ["MOST_TOKENS", "IncrementalDecoder", "Texts", "padded"]

MOST_TOKENS = 256
"""Tokens to generate if a task sets no limit, as in lm-evaluation-harness's own models."""

Texts = Sequence[Sequence[int]]


class IncrementalDecoder:
    """Computes final hidden states of growing texts, reading each token only once thanks to a KV cache.

    Collective over the world; every rank must pass the same number of texts.
    """

    def __init__(
        self,
        run: Callable[[Sequence[DecodeBatch]], list[Tensor]],
        topology: Topology,
        texts: Texts,
        most: int,
        micro_batch: int,
    ) -> None:
        """run: micro-batches -> final hidden states, on the last stage. most: tokens added to a text at most."""
        self._run, self._topology, self._micro_batch = run, topology, micro_batch
        room = padded(texts, topology).shape[1] + most + topology.tp  # tp: padding of the last token
        rows = torch.arange(len(texts)).split(micro_batch)
        self._caches = [KVCache(len(part), room) for part in rows]
        self._read = [0] * len(texts)

    def __call__(self, texts: Texts) -> dict[int, Tensor]:
        """Return text number -> final state [h] of its last token, on the last pipeline stage. No text may be empty."""
        starts = [min(read, len(text) - 1) for read, text in zip(self._read, texts, strict=True)]
        new = [text[start:] for start, text in zip(starts, texts, strict=True)]
        parts = padded(new, self._topology).split(self._micro_batch)
        for cache, cache_starts in zip(self._caches, torch.tensor(starts).split(self._micro_batch), strict=True):
            cache.starts = cache_starts
        batches = [
            DecodeBatch(part.to(self._topology.device), AttentionContext(cache=cache))
            for part, cache in zip(parts, self._caches, strict=True)
        ]
        self._read = [len(text) for text in texts]
        found = {}
        for number, hidden in enumerate(self._run(batches)):
            if self._topology.sequence_parallel:
                hidden = gather_sequence(hidden, self._topology.tp_group)
            for column in range(hidden.shape[1]):
                at = number * self._micro_batch + column
                found[at] = hidden[len(new[at]) - 1, column]
        return found


def padded(texts: Texts, topology: Topology) -> Tensor:
    """Return int64 [texts, tokens of the longest], shorter texts padded with zeros at the end."""
    longest = max(1, *map(len, texts))
    if topology.ep > 1:  # ranks that share experts must exchange equally many tokens
        longest = max(gather_objects(longest))
    longest += -longest % (topology.tp if topology.sequence_parallel else 1)
    tokens = torch.zeros(len(texts), longest, dtype=torch.int64)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = torch.tensor(text, dtype=torch.int64)
    return tokens
