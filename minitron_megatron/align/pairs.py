"""Preference pairs as tokens: on disk, and as micro-batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Bool, Float64
from numpy.typing import NDArray
from torch import Tensor

from .. import numbers
from ..data import REWARD_KEYS, Batch, PreferencePair, check_split
from ..errors import DataError, FileError
from ..files import whole_file
from ..parallel import Topology

__all__ = [
    "Pair",
    "PairBatch",
    "PairFile",
    "Reference",
    "held_out_pairs",
    "padded_length",
    "pair_batch",
    "pair_order",
    "save_arrays",
    "step_pairs",
    "tokenize_pairs",
]

Reference = NDArray[np.float32]
"""[pairs, 2]: log p of the chosen and the rejected response under the frozen start of the round, in nats."""


class Pair(NamedTuple):
    prompt: NDArray[np.int32]
    responses: tuple[NDArray[np.int32], NDArray[np.int32]]
    """The chosen and the rejected one."""
    rewards: NDArray[np.float64]
    """Rewards of the two responses; NaN where the data has none."""


@dataclass(frozen=True, kw_only=True)
class PairBatch(Batch):
    """Micro-batch of pairs: row 2i holds the prompt of pair i with the chosen response, row 2i + 1 with the rejected.

    `mask`: tokens whose label belongs to a response.
    """

    reference: Float64[Tensor, "pairs 2"]
    """log p of the responses under the reference, in nats; NaN where it is not known yet."""
    rewards: Float64[Tensor, "pairs 2"]
    real: Bool[Tensor, "pairs"]
    """Whether a pair counts; others fill a micro-batch up."""

    @property
    def counted(self) -> Tensor:
        """Number of pairs; of ranks that share sequences, the first one counts them."""
        return self.real.sum() * self.is_first_shard

    @property
    def is_first_shard(self) -> bool:
        """Whether this rank is the first of those that share its sequences."""
        shard = self.attention_context.shard if self.attention_context else None
        return shard is None or shard.rank == 0

    def to(self, device: torch.device) -> Self:
        own = {name: getattr(self, name).to(device) for name in ("reference", "rewards", "real")}
        return replace(super().to(device), **own)


def tokenize_pairs(
    pairs: Iterable[PreferencePair],
    path: Path,
    *,
    sequence: int,
    vocab: int,
    rewarded: bool,
    held_out: float | Iterable[PreferencePair],
    seed: int,
) -> int:
    """Write pairs to a file and return the number of those of which a response was cut off at `sequence` tokens.

    vocab: entries of the model's vocabulary. rewarded: refuse pairs without rewards. held_out: pairs to hold out, or
    the share of the pairs to hold out, drawn by the seed. Raises DataError, which names the place, for a token that the
    model does not have, where a prompt leaves no room for a response, or where the two responses are equal as far as
    they are read; and where too few pairs are left.
    """
    kept = _Columns(sequence, vocab, rewarded)
    kept.add(pairs)
    count = len(kept.rewards)
    if isinstance(held_out, float | int):
        held = max(1, round(held_out * count)) if held_out else 0
        chosen = np.random.default_rng(seed).permutation(count)[:held]
    else:
        kept.add(held_out)
        chosen = np.arange(count, len(kept.rewards))
    if len(chosen) >= len(kept.rewards) or not count:
        raise DataError(
            f"The sources hold {numbers.counted(count, 'preference pair')}, and {len(chosen)} are held out: none is "
            "left to train on. Give more pairs, or hold out fewer."
        )
    flags = np.zeros(len(kept.rewards), np.uint8)
    flags[chosen] = 1
    save_arrays(
        path,
        tokens=np.concatenate(kept.tokens),
        ends=np.array(kept.ends).reshape(-1, 3),
        rewards=np.array(kept.rewards),
        held_out=flags,
    )
    return kept.cut


@dataclass
class _Columns:
    """Pairs as they are written."""

    sequence: int
    vocab: int
    rewarded: bool
    tokens: list[NDArray[np.int32]] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    rewards: list[tuple[float, float]] = field(default_factory=list)
    cut: int = 0
    total: int = 0

    def add(self, pairs: Iterable[PreferencePair]) -> None:
        for pair in pairs:
            chosen, rejected = _fitting(pair, self.sequence)
            if (largest := max(int(part.max()) for part in (pair.prompt, chosen, rejected))) >= self.vocab:
                raise DataError(
                    f"{pair.place} has the token {largest}, and the model has {self.vocab} entries. Remove the token "
                    "from the text, or use the tokenizer that came with the model."
                )
            if self.rewarded and pair.rewards is None:
                raise DataError(
                    f"{pair.place} has no rewards, which this loss needs. Add {' and '.join(REWARD_KEYS)}, or train "
                    "by dpo."
                )
            self.cut += len(chosen) < len(pair.chosen) or len(rejected) < len(pair.rejected)
            for part in (pair.prompt, chosen, rejected):
                self.tokens.append(part.astype(np.int32))
                self.total += len(part)
                self.ends.append(self.total)
            self.rewards.append(pair.rewards or (np.nan, np.nan))


def _fitting(pair: PreferencePair, sequence: int) -> tuple[NDArray, NDArray]:
    """Return the responses, cut off at `sequence` tokens after the prompt's beginning."""
    room = sequence + 1 - len(pair.prompt)  # the last token is only a label
    if room < 1:
        raise DataError(
            f"{pair.place} has a prompt of {len(pair.prompt):,} tokens, and samples have {sequence:,}. Remove the "
            "pair, or set a longer `sequence`."
        )
    chosen, rejected = pair.chosen[:room], pair.rejected[:room]
    if np.array_equal(chosen, rejected):
        raise DataError(
            f"{pair.place} has responses that are equal in the first {len(chosen):,} tokens, which is all that is read "
            f"at a sequence of {sequence:,}. Remove the pair, or set a longer `sequence`."
        )
    return chosen, rejected


def save_arrays(path: Path, **arrays: NDArray) -> None:
    """Write arrays to a safetensors file, whole or not at all."""
    from safetensors.numpy import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        save_file(arrays, partial)


class PairFile:
    """Pairs that `tokenize_pairs` wrote, read one at a time. Raises FileError where the file is damaged."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self._file = safe_open(path, "numpy")
            names = ("ends", "rewards", "held_out")
            self._ends, self._rewards, self._held_out = (self._file.get_tensor(name) for name in names)
            self._tokens = self._file.get_slice("tokens")
            whole = len(self._ends) == len(self._rewards) and self._tokens.get_shape() == [int(self._ends[-1, 2])]
        except (OSError, SafetensorError, IndexError) as error:
            raise FileError(f"{path} cannot be read: {error}. Remove it, and run the command again.") from error
        if not whole:
            raise FileError(f"{path} holds no pairs. Remove it, and run the command again.")

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> Pair:
        start = int(self._ends[index - 1, 2]) if index else 0
        prompt, chosen, rejected = (int(end) for end in self._ends[index])
        tokens = self._tokens[start:rejected]
        parts = np.split(tokens, [prompt - start, chosen - start])
        return Pair(parts[0], (parts[1], parts[2]), self._rewards[index])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens that the model reads of each pair's longer row: [pairs]. The last token is only a label."""
        starts = np.concatenate([[0], self._ends[:-1, 2]])
        prompt, chosen, rejected = np.diff(np.column_stack([starts, self._ends])).T
        return prompt + np.maximum(chosen, rejected) - 1

    def split(self, *, held_out: bool) -> NDArray[np.int64]:
        """Return the numbers of the pairs that are held out, or of the others."""
        return np.flatnonzero(self._held_out == held_out)


def pair_batch(
    pairs: Sequence[Pair], length: int, reference: Reference | None = None, real: Sequence[bool] | None = None
) -> PairBatch:
    """Return a micro-batch of pairs, on the host. length: tokens of a row, with padding at the end."""
    rows = [np.concatenate([pair.prompt, response]) for pair in pairs for response in pair.responses]
    firsts = [len(pair.prompt) - 1 for pair in pairs for _ in pair.responses]
    tokens, labels = (torch.zeros(len(rows), length, dtype=torch.int64) for _ in range(2))
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for at, (row, first) in enumerate(zip(rows, firsts, strict=True)):
        tokens[at, : len(row) - 1], labels[at, : len(row) - 1] = map(torch.from_numpy, (row[:-1], row[1:]))
        mask[at, first : len(row) - 1] = True
    return PairBatch(
        tokens,
        labels,
        mask,
        reference=torch.from_numpy(np.full((len(pairs), 2), np.nan) if reference is None else reference.astype(float)),
        rewards=torch.from_numpy(np.stack([pair.rewards for pair in pairs])),
        real=torch.tensor([True] * len(pairs) if real is None else list(real)),
    )


def pair_order(pairs: Sequence[int] | NDArray, count: int, seed: int) -> NDArray[np.int64]:
    """Return `count` of the pairs in the order of training: epoch after epoch, each shuffled by the seed."""
    epochs = -(-count // len(pairs))
    shuffled = [np.random.default_rng((seed, epoch)).permutation(pairs) for epoch in range(epochs)]
    return np.concatenate(shuffled)[:count]


def held_out_pairs(
    file: PairFile, reference: Reference, chosen: NDArray[np.int64], micro_batch: int, topology: Topology
) -> list[PairBatch]:
    """Return this data-parallel rank's micro-batches of held-out pairs, the same number on every rank."""
    rounds = topology.pp if topology.vp > 1 else 1  # the interleaved schedule needs a multiple of pp
    share = -(-len(chosen) // (micro_batch * topology.dp * rounds)) * micro_batch * rounds
    length = padded_length(file.lengths[chosen], topology.tp if topology.sequence_parallel else 1)
    batches = []
    for start in range(topology.dp_rank * share, (topology.dp_rank + 1) * share, micro_batch):
        real = [at < len(chosen) for at in range(start, start + micro_batch)]
        some = chosen[np.minimum(np.arange(start, start + micro_batch), len(chosen) - 1)]
        batch = pair_batch([file[at] for at in some], length, reference[some], real)
        batches.append(batch.to(topology.device))
    return batches


def padded_length(lengths: NDArray[np.int64], unit: int) -> int:
    """Return the length of the longest row, rounded up to a multiple of `unit`."""
    longest = int(lengths.max())
    return longest + -longest % unit


def step_pairs(
    file: PairFile,
    reference: Reference,
    chosen: NDArray[np.int64],
    micro_batch: int,
    topology: Topology,
) -> Iterator[PairBatch]:
    """Yield this rank's micro-batches of a step, on its device. chosen: all pairs of the step, in order.

    All rows of a step have the same length. Ranks that share sequences get their parts.
    """
    check_split("global_batch", len(chosen), micro_batch, topology.replicas)
    share, length = len(chosen) // topology.replicas, padded_length(file.lengths[chosen], topology.sequence_unit)
    mine = chosen[topology.replica * share :][:share]
    for some in np.split(mine, range(micro_batch, share, micro_batch)):
        batch = pair_batch([file[at] for at in some], length, reference[some])
        yield batch.to(topology.device).shared(topology)
