"""The states that foretell the next token of texts that grow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..model import DecodeBatch, KVCache
from ..parallel import Topology, gather_objects, gather_sequence

__all__ = ["IncrementalDecoder", "Texts", "padded"]

Texts = Sequence[Sequence[int]]


class IncrementalDecoder:
    """Reads texts as they grow, each token once: keys and values of what it has read are kept.

    Collective over the world, whose ranks are to give as many texts each.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Any]], list[Tensor]],
        topology: Topology,
        texts: Texts,
        most: int,
        micro_batch: int,
    ) -> None:
        """run: micro-batches -> their final hidden states, on the last stage. most: tokens that come to a text."""
        self._run, self._topology, self._micro_batch = run, topology, micro_batch
        room = padded(texts, topology).shape[1] + most + topology.tp  # tp: what pads the last token
        rows = torch.arange(len(texts)).split(micro_batch)
        self._pasts = [KVCache(len(part), room) for part in rows]
        self._read = [0] * len(texts)

    def __call__(self, texts: Texts) -> dict[int, Tensor]:
        """Text -> final state [h] of its last token; last pipeline stage only. No text is empty."""
        starts = [min(read, len(text) - 1) for read, text in zip(self._read, texts, strict=True)]
        new = [text[start:] for start, text in zip(starts, texts, strict=True)]
        parts = padded(new, self._topology).split(self._micro_batch)
        for past, own in zip(self._pasts, torch.tensor(starts).split(self._micro_batch), strict=True):
            past.starts = own
        batches = [
            DecodeBatch(part.to(self._topology.device), past) for part, past in zip(parts, self._pasts, strict=True)
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
    """int64 [texts, tokens of the longest], zeros behind the shorter ones."""
    longest = max(1, *map(len, texts))
    if topology.ep > 1:  # ranks that share experts exchange tokens: as many each
        longest = max(gather_objects(longest))
    longest += -longest % (topology.tp if topology.sequence_parallel else 1)
    tokens = torch.zeros(len(texts), longest, dtype=torch.int64)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = torch.tensor(text, dtype=torch.int64)
    return tokens
