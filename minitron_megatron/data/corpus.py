"""Samples of a weighted blend of prepared corpora, shuffled by a seed, with megatron-core's GPTDataset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple
from uuid import uuid4

import numpy as np
import torch
from jaxtyping import Bool, Int64
from numpy.typing import NDArray
from torch import Tensor

from ..errors import DataError
from ..parallel import broadcast_object, fail_together
from .cache import write_once
from .chat_encode import COUNTS, LAST
from .token_files import TokenFiles, check_blocks, find_token_files

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDataset

__all__ = ["Corpus", "samples_by_source"]

Blend = Sequence[tuple[str | Path, float]]
"""Pairs (prefix of a prepared corpus, weight); the weights need not add up to 1."""


class Sample(NamedTuple):
    tokens: Int64[Tensor, "seq"]
    labels: Int64[Tensor, "seq"]
    """Next token of each token."""
    mask: Bool[Tensor, "seq"]
    """Whether the label of a token counts in the loss."""
    ends: Bool[Tensor, "seq"]
    """Whether a token is the last one of its document, where documents are separate; else false."""


STAND_IN = SimpleNamespace(vocab_size=None, eod=None, unique_identifiers={})
"""Placeholder for the tokenizer that mcore's configuration requires: nothing here tokenizes, pads or masks with it."""


class Corpus:
    """Dataset of `samples` sequences of `sequence` tokens, drawn from the corpora in proportion to their weights.

    Sample i is the same at every layout: it depends on the corpora, their weights, `sequence`, `samples` and `seed`. A
    corpus too small for its share is read again in another order (mcore's epochs), or refused if `repeat` is false.
    `end`: end-of-document token of text, after which batches begin another document; chats have marks of their own.
    None: documents are not separate.
    Collective over the world: rank 0 writes the index to `cache`, a folder that every rank must see. Raises DataError
    where a corpus is missing, damaged or too small.
    """

    def __init__(
        self,
        blend: Blend,
        split: str = "train",
        *,
        sequence: int,
        samples: int,
        seed: int,
        cache: str | Path,
        repeat: bool = True,
        end: int | None = None,
    ) -> None:
        from megatron.core import __version__ as megatron

        self.end = end
        ticket = uuid4().hex
        first_rank = broadcast_object(ticket) == ticket
        with fail_together():
            weights = _normalised(blend)
            pairs = [find_token_files(prefix, split) for prefix, _ in blend]
            self._choice, self._place = _interleave(weights, samples)
            counts = np.bincount(self._choice, minlength=len(pairs)).tolist()
            for pair, count in zip(pairs, counts, strict=True):
                _check_size(pair, sequence, 1 if repeat else count)
                if first_rank:
                    check_blocks(pair)
        key = json.dumps([megatron, split, sequence, seed, counts, [pair.content for pair in pairs]])
        folder = Path(cache) / hashlib.sha256(key.encode()).hexdigest()[:16]

        def index(folder: Path) -> list[_Source]:
            each = zip(pairs, counts, strict=True)
            return [_Source(pair, count, split, sequence, seed, folder) for pair, count in each]

        write_once(folder, index, first_rank=first_rank)
        self._sources = index(folder)

    def __len__(self) -> int:
        return len(self._choice)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} is out of range: there are {len(self)}")
        return self._sources[self._choice[index]].sample(int(self._place[index]), self.end)


class _Source:
    """Samples of one corpus: mcore's GPTDataset, and of chats another one, of the marks, with the same index."""

    def __init__(self, pair: TokenFiles, samples: int, split: str, sequence: int, seed: int, folder: Path) -> None:
        self._tokens, *marks = (
            _dataset(prefix, pair, samples, split, sequence, seed, folder)
            for prefix in (pair.prefix, pair.mask)
            if prefix
        )
        self._marks = marks[0] if marks else None

    def sample(self, index: int, end: int | None) -> Sample:
        """Return a sample. end: end-of-document token where documents are separate."""
        found = self._tokens[index]
        tokens, labels, mask = found["tokens"], found["labels"], found["loss_mask"].bool()
        last = tokens == end
        if self._marks is not None:
            marks = self._marks[index]
            mask = (marks["labels"] & COUNTS) > 0
            last = (marks["tokens"] & LAST) > 0
        ends = last if end is not None else torch.zeros_like(mask)
        return Sample(tokens, labels, mask & ~ends, ends)


def _normalised(blend: Blend) -> NDArray[np.float64]:
    weights = np.array([weight for _, weight in blend], np.float64)
    if not len(weights) or not (weights > 0).all() or not np.isfinite(weights).all():
        raise DataError(f"The weights {weights.tolist()} are not all finite and above 0. Give each corpus one that is.")
    return weights / weights.sum()


def _interleave(weights: NDArray[np.float64], samples: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """Return the corpus of each sample and its index there; every prefix follows the weights as closely as possible."""
    from megatron.core.datasets.helpers import build_blending_indices

    choice, place = np.zeros(samples, np.int16), np.zeros(samples, np.int64)
    build_blending_indices(choice, place, weights, len(weights), samples, False)
    return choice, place


def samples_by_source(weights: Sequence[float], samples: int) -> list[int]:
    """Return the number of the `samples` that each source of a blend provides."""
    share = _normalised([("", weight) for weight in weights])
    return np.bincount(_interleave(share, samples)[0], minlength=len(weights)).tolist()


def _check_size(pair: TokenFiles, sequence: int, count: int) -> None:
    held = (pair.tokens - 1) // sequence  # the last label needs one more token
    if held < count:
        raise DataError(
            f"{pair.prefix} holds {held:,} different sequences of {sequence:,} tokens ({pair.tokens:,} tokens), "
            f"and {count:,} are needed. Use fewer tokens or less of this corpus, or set `repeat` to true."
        )


def _dataset(
    prefix: Path, pair: TokenFiles, samples: int, split: str, sequence: int, seed: int, folder: Path
) -> GPTDataset:
    """Return mcore's GPTDataset of the pair at a prefix, which has the documents of `pair`, with its index in `folder`.

    By mcore's rule, only rank 0 writes a missing index.
    """
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence,
        blend_per_split=[([str(prefix)], None), None, None],
        path_to_cache=str(folder),
        tokenizer=STAND_IN,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    tokens = GPTDataset.build_low_level_dataset(str(prefix), config)
    chosen = np.arange(len(tokens), dtype=np.int32) if pair.sequences is None else pair.sequences
    # named by content, since a corpus may move
    return GPTDataset(tokens, pair.content, chosen, samples, Split[split], config)
