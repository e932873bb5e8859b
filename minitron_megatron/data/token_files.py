"""`.bin/.idx` pairs in megatron-core's format: finding and checking them.

A second pair, `<prefix>.mask.bin/.idx`, holds a mark for each token of a chat (`chat_encode`): trained on, last of its
document.

A `.json` file beside a pair holds the checksums of its files; the `.bin` file has one per block. Pairs written by
other programs have no `.json`. A `.json` without a pair beside it names a pair elsewhere that is used in place, and the
documents of it that belong to the split.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypedDict

from ..errors import DataError
from ..files import checksum, read_json
from .idx import count_tokens, read_index

__all__ = [
    "BLOCK",
    "KINDS",
    "MASK",
    "SPLITS",
    "Checksums",
    "Prepared",
    "PreparedSplit",
    "Share",
    "TokenFiles",
    "check_blocks",
    "check_content",
    "content_of",
    "find_pair",
    "find_token_files",
    "split_file",
]

SPLITS = ("train", "valid")
MASK = "mask"
KINDS = ("idx", f"{MASK}.idx", "json", f"{MASK}.bin", "bin")
"""Files of a split, in reverse order of their renaming into place; only chats have a mask."""
BLOCK = 1 << 24
"""Bytes of a `.bin` file per checksum."""
BLOCKS_CHECKED = 64
"""Maximum number of blocks checked whenever a corpus is opened: a gigabyte, which takes about a second."""


@dataclass(frozen=True)
class PreparedSplit:
    """Pair of files `<prefix>.bin` and `<prefix>.idx`, or a part of its documents."""

    prefix: Path
    documents: int
    tokens: int
    """Number of tokens, with the end-of-document tokens."""


@dataclass(frozen=True)
class Prepared:
    """Result of `prepare`."""

    train: PreparedSplit
    valid: PreparedSplit | None
    end: int
    """End-of-document token."""
    content: str
    """SHA-256 over the token ids and document lengths of both splits; it does not depend on their paths."""
    read: float = 1.0
    """Share of the bytes of the sources that was read; below 1 where the tokens that were wanted are enough."""


@dataclass(frozen=True)
class Share:
    """Random part of the documents of a pair."""

    share: float
    """Fraction of the documents that is held out."""
    seed: int
    held_out: bool
    """Whether the part is what is held out, or the rest."""

    def sequences(self, idx: Path) -> tuple[NDArray[np.int32], int, int]:
        """Return the sequences of the part, and the numbers of its tokens and documents."""
        lengths, _, ends = read_index(idx)
        chosen = (_draws(len(ends) - 1, self.seed) < self.share) == self.held_out
        sequences = np.flatnonzero(np.repeat(chosen, np.diff(ends))).astype(np.int32)
        return sequences, int(lengths[sequences].sum(dtype=np.int64)), int(chosen.sum())


def _draws(count: int, seed: int) -> NDArray[np.float64]:
    """Return a pseudo-random number in [0, 1) for each of `count` documents, by its index and the seed (SplitMix64)."""
    state = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state += np.uint64(int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8).digest(), "big"))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    return ((state ^ (state >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2**53


class Part(TypedDict):
    """Fields of a `Share`, as a `.json` file holds them."""

    share: float
    seed: int
    held_out: bool


class Checksums(TypedDict, total=False):
    """Content of the `.json` file of a pair; empty without one."""

    content: str
    """Content hash of the split."""
    idx: str
    """SHA-256 of the `.idx` file."""
    block: int
    """Bytes of the `.bin` file per checksum."""
    bin: list[str]
    """SHA-256 of each block."""
    pair: str
    """Prefix of the pair that is used in place."""
    part: Part | None
    """Documents of that pair that belong to the split; None: all."""
    mask: MaskSums
    """Checksums of the pair of marks; absent without one."""


class MaskSums(TypedDict):
    idx: str
    bin: list[str]


@dataclass(frozen=True)
class TokenFiles:
    """Pair that was found complete, or the part of it that belongs to a split."""

    prefix: Path
    tokens: int
    content: str
    """SHA-256 of the `.idx` file, which holds the document lengths in order, and of the choice of documents."""
    sequences: NDArray[np.int32] | None = field(default=None, compare=False)
    """Sequences of the index that belong to the split; None: all."""
    checksums: Checksums = field(default_factory=Checksums)

    @property
    def mask(self) -> Path | None:
        """Prefix of the pair of marks, if there is one."""
        return Path(f"{self.prefix}.{MASK}") if "mask" in self.checksums else None


def find_token_files(prefix: str | Path, split: str) -> TokenFiles:
    """Return the pair of a split, or its part of a pair that is used in place.

    Raises DataError where a file is missing, where the two do not match, or where the `.idx` file has changed.
    """
    here = split_file(prefix, split, "json").with_suffix("")
    sums = _checksums(here)
    found = find_pair(_place(here, sums), f"Prepare the corpus {prefix} again.")
    if sums and sums["idx"] != found.content:
        raise DataError(f"{found.prefix}.idx has changed since it was written. Prepare the corpus {prefix} again.")
    if "mask" in sums:
        marks = find_pair(Path(f"{here}.{MASK}"), f"Prepare the corpus {prefix} again.")
        if marks.content != sums["mask"]["idx"] or marks.tokens != found.tokens:
            raise DataError(f"{marks.prefix}.idx has changed since it was written. Prepare the corpus {prefix} again.")
    if not (part := sums.get("part")):
        return replace(found, checksums=sums)
    share = Share(**part)
    sequences, tokens, _ = share.sequences(Path(f"{found.prefix}.idx"))
    return TokenFiles(found.prefix, tokens, content_of([found.content, repr(share)]), sequences, sums)


def find_pair(prefix: Path, again: str) -> TokenFiles:
    """Return the pair `<prefix>.bin/.idx`. again: what to do if it is incomplete, for the message of the DataError."""
    idx, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    try:
        for file in (idx, data):
            if not file.is_file():
                raise DataError(f"There is no {file}. {again.removesuffix(' again.')}, or correct its prefix.")
        if not data.stat().st_size:
            raise DataError(f"{data} is empty. {again}")
        tokens, size = count_tokens(idx)
        if tokens * size != data.stat().st_size:
            raise ValueError(f"it counts {tokens:,} tokens of {size} bytes")
        return TokenFiles(prefix, tokens, checksum(idx))
    except ValueError as error:
        raise DataError(f"{idx} is not an index of {data}: {error}. {again}") from error
    except OSError as error:
        raise DataError(f"{error.filename or idx} cannot be read: {error.strerror or error}. {again}") from error


def check_blocks(pair: TokenFiles) -> None:
    """Raise DataError where blocks of the `.bin` files have changed since they were written.

    Checks the first, the last and random other blocks of each, up to `BLOCKS_CHECKED`: all blocks of a corpus of up to
    a gigabyte.
    """
    if not (sums := pair.checksums):
        return
    _check_blocks(Path(f"{pair.prefix}.bin"), sums["block"], sums["bin"])
    if pair.mask:
        _check_blocks(Path(f"{pair.mask}.bin"), sums["block"], sums["mask"]["bin"])


def _check_blocks(data: Path, block: int, known: list[str]) -> None:
    chosen = {0, len(known) - 1, *random.SystemRandom().sample(range(len(known)), min(len(known), BLOCKS_CHECKED - 2))}
    with data.open("rb") as stream:
        for number in sorted(chosen if len(known) > BLOCKS_CHECKED else range(len(known))):
            stream.seek(number * block)
            if hashlib.sha256(stream.read(block)).hexdigest() != known[number]:
                where = f"between the bytes {number * block:,} and {(number + 1) * block:,}"
                raise DataError(f"{data} has changed since it was written, {where}. Prepare the corpus again.")


def check_content(prefix: str | Path, content: str) -> None:
    """Raise DataError where the pairs at `prefix` are not those for which `prepare` returned `content`."""
    known = [_checksums(Path(f"{prefix}.{split}")) for split in SPLITS if split_file(prefix, split, "json").exists()]
    if known and content_of(sums["content"] for sums in known) != content:
        raise DataError(f"{prefix} is not the corpus that this run prepared. Prepare it again.")


def content_of(splits: Iterable[str]) -> str:
    """Return the content hash of a whole corpus from those of its splits."""
    return hashlib.sha256("".join(splits).encode()).hexdigest()


def _checksums(prefix: Path) -> Checksums:
    """Return the `.json` at a prefix; empty where there is no such file. Raises DataError where it is damaged."""
    file = Path(f"{prefix}.json")
    if not file.exists():
        return {}
    sums, data = read_json(file), Path(f"{prefix}.bin")
    match sums:
        case {"content": str(), "idx": str(), "block": int(block), "bin": [*known]} if 0 < block <= BLOCK:
            data = Path(f"{_place(prefix, sums)}.bin")
            masked = "mask" not in sums or _is_mask(sums["mask"], Path(f"{prefix}.{MASK}.bin"), block)
            whole = data.is_file() and len(known) == -(-data.stat().st_size // block)
            if whole and masked and _is_part(sums.get("part")):
                return sums
    raise DataError(f"{file} holds no checksums of {data}. Prepare the corpus again.")


def _place(prefix: Path, sums: Checksums) -> Path:
    """Return the prefix of the pair that a split uses in place, else its own."""
    return Path(sums["pair"]) if isinstance(sums.get("pair"), str) else prefix


def _is_mask(mask: object, data: Path, block: int) -> bool:
    match mask:
        case {"idx": str(), "bin": [*known]}:
            return not data.is_file() or len(known) == -(-data.stat().st_size // block)
    return False


def _is_part(part: object) -> bool:
    match part:
        case None:
            return True
        case {"share": float(), "seed": int(), "held_out": bool(), **more}:
            return not more
    return False


def split_file(prefix: str | Path, split: str, kind: str) -> Path:
    """Return the path of a file of a split's pair."""
    return Path(f"{prefix}.{split}.{kind}")
