"""Samples of a weighted blend of prepared corpora, in an order that the seed sets, on megatron-core's GPTDataset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import DataError
from ..parallel import broadcast_object, fail_together
from .cache import write_once
from .token_files import TokenFiles, check_blocks, find_token_files

__all__ = ["Corpus", "samples_by_source"]

Blend = Sequence[tuple[str | Path, float]]
"""(prefix of a prepared corpus, weight); the weights need not add up to 1."""

STAND_IN = SimpleNamespace(vocab_size=None, eod=None, unique_identifiers={})
"""For the tokenizer that mcore's configuration asks for: nothing here tokenizes, pads, or masks by one."""


class Corpus:
    """`samples` sequences of `sequence` tokens, drawn from the corpora in proportion to their weights.

    Sample i is the same at every layout: it depends on the corpora, their weights, `sequence`, `samples` and `seed`. A
    corpus too small for its part is read again in another order (mcore's epochs), or refused where `repeat` is false.
    `end`: the token after which batches begin another document.
    Collective over the world: rank 0 writes the index that every rank reads to `cache`, a folder that all of them see.
    Raises DataError where a corpus is missing, damaged or too small.
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

        def index(folder: Path) -> list[Any]:
            return [_dataset(p, count, split, sequence, seed, folder) for p, count in zip(pairs, counts, strict=True)]

        write_once(folder, index, first_rank=first_rank)
        self._datasets = index(folder)

    def __len__(self) -> int:
        return len(self._choice)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and labels, int64 [seq], and the mask, bool [seq]: where the loss counts."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        sample = self._datasets[self._choice[index]][int(self._place[index])]
        return sample["tokens"], sample["labels"], sample["loss_mask"].bool()


def _normalised(blend: Blend) -> NDArray[np.float64]:
    weights = np.array([weight for _, weight in blend], np.float64)
    if not len(weights) or not (weights > 0).all() or not np.isfinite(weights).all():
        raise DataError(f"The weights {weights.tolist()} do not blend. Name one corpus or more, each above 0.")
    return weights / weights.sum()


def _interleave(weights: NDArray[np.float64], samples: int) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """For each sample its corpus, and its place in that: at any point as near to the weights as whole samples allow."""
    from megatron.core.datasets.helpers import build_blending_indices

    choice, place = np.zeros(samples, np.int16), np.zeros(samples, np.int64)
    build_blending_indices(choice, place, weights, len(weights), samples, False)
    return choice, place


def samples_by_source(weights: Sequence[float], samples: int) -> list[int]:
    """Return how many of `samples` each source of a blend gives."""
    share = _normalised([("", weight) for weight in weights])
    return np.bincount(_interleave(share, samples)[0], minlength=len(weights)).tolist()


def _check_size(pair: TokenFiles, sequence: int, count: int) -> None:
    held = (pair.tokens - 1) // sequence  # one token more, for the last label
    if held < count:
        raise DataError(
            f"{count} different sequences of {sequence} tokens are asked of {pair.prefix}, which holds {held} "
            f"({pair.tokens} tokens). Ask for fewer tokens or less of this corpus, or let it repeat (data.repeat)."
        )


def _dataset(pair: TokenFiles, samples: int, split: str, sequence: int, seed: int, folder: Path) -> Any:
    """mcore's GPTDataset with its index in `folder`; rank 0 alone writes what is not there yet (mcore's own rule)."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.utils import Split

    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence,
        blend_per_split=[([str(pair.prefix)], None), None, None],
        path_to_cache=str(folder),
        tokenizer=STAND_IN,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    tokens = GPTDataset.build_low_level_dataset(str(pair.prefix), config)
    every = np.arange(len(tokens), dtype=np.int32)
    return GPTDataset(tokens, pair.content, every, samples, Split[split], config)  # by content: a corpus may move
