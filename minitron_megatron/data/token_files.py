"""`.bin/.idx` pairs in megatron-core's format: writing them atomically, finding and checking them.

A `.json` file beside a pair holds the checksums of both files; the `.bin` file has one per block. Pairs written by
other programs have no `.json`.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import DTypeLike, NDArray

from ..errors import DataError, FileError
from ..files import checksum, read_json, told_by, whole_file
from .idx import count_tokens

__all__ = [
    "SPLITS",
    "TokenFileWriter",
    "TokenFiles",
    "check_blocks",
    "check_content",
    "content_of",
    "find_token_files",
    "pair_writers",
    "token_dtype",
]

SPLITS = ("train", "valid")
KINDS = ("idx", "json", "bin")
"""Files of a pair, in reverse order of their renaming into place."""
BLOCK = 1 << 24
"""Bytes of a `.bin` file per checksum."""
BLOCKS_CHECKED = 64
"""Maximum number of blocks checked whenever a corpus is opened: a gigabyte, which takes about a second."""


def token_dtype(vocab: int) -> DTypeLike:
    """Return megatron-core's dtype for token ids: uint16 where every id fits, else int32."""
    from megatron.core.datasets.indexed_dataset import DType

    return DType.optimal_dtype(vocab)


@dataclass
class Blocks:
    """SHA-256 of every `BLOCK` bytes of a stream."""

    done: list[str] = field(default_factory=list)
    _hash: Any = field(default_factory=hashlib.sha256)
    _held: int = 0

    def add(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            part, rest = rest[: BLOCK - self._held], rest[BLOCK - self._held :]
            self._hash.update(part)
            self._held += len(part)
            if self._held == BLOCK:
                self._close()

    def end(self) -> list[str]:
        if self._held:
            self._close()
        return self.done

    def _close(self) -> None:
        self.done.append(self._hash.hexdigest())
        self._hash, self._held = hashlib.sha256(), 0


class TokenFileWriter:
    """Writer of documents to a pair, with counts and checksums."""

    def __init__(self, bin_file: Path, dtype: DTypeLike) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self._builder = IndexedDatasetBuilder(str(bin_file), dtype)
        self._hash = hashlib.sha256()
        self._blocks = Blocks()
        self.documents = 0
        self.tokens = 0

    def add(self, ids: NDArray) -> None:
        self._builder.add_document(ids, [len(ids)])
        data = ids.tobytes()
        self._hash.update(len(ids).to_bytes(8, "little") + data)
        self._blocks.add(data)
        self.documents += 1
        self.tokens += len(ids)

    def close(self, idx_file: Path) -> dict[str, Any]:
        """Write the index, and return the pair's checksums."""
        self._builder.finalize(str(idx_file))
        return {"content": self.content, "idx": checksum(idx_file), "block": BLOCK, "bin": self._blocks.end()}

    @property
    def content(self) -> str:
        """SHA-256 over the token ids and the document lengths."""
        return self._hash.hexdigest()


@contextmanager
def pair_writers(
    out_prefix: str | Path, splits: Sequence[str], dtype: DTypeLike
) -> Iterator[dict[str, TokenFileWriter]]:
    """Yield a writer for each of `splits`; on success their pairs replace all earlier ones at `<out_prefix>.<split>`.

    Raises FileError where they cannot be written.
    """
    try:
        with ExitStack() as stack:  # exits in reverse order: an .idx appears only after all .bin files and checksums
            files = {
                (split, kind): stack.enter_context(whole_file(_file(out_prefix, split, kind)))
                for kind in KINDS
                for split in splits
            }
            writers = {split: TokenFileWriter(files[split, "bin"], dtype) for split in splits}
            yield writers
            for split, writer in writers.items():
                sums = writer.close(files[split, "idx"])
                files[split, "json"].write_text(json.dumps(sums) + "\n", encoding="utf-8")
            for split in SPLITS:
                for kind in KINDS:
                    _file(out_prefix, split, kind).unlink(missing_ok=True)
    except OSError as error:
        raise FileError(told_by(error) or f"The corpus {out_prefix} cannot be written: {error}.") from error


@dataclass(frozen=True)
class TokenFiles:
    """Pair that was found complete."""

    prefix: Path
    tokens: int
    content: str
    """SHA-256 of the `.idx` file, which holds the document lengths in order."""


def find_token_files(prefix: str | Path, split: str) -> TokenFiles:
    """Return the pair of a split.

    Raises DataError where a file is missing, where the two do not match, or where the `.idx` file has changed.
    """
    idx, data = (_file(prefix, split, kind) for kind in ("idx", "bin"))
    again = f"Prepare the corpus {prefix} again."
    try:
        for file in (idx, data):
            if not file.is_file():
                raise DataError(f"There is no {file}. Prepare the corpus {prefix}, or correct its prefix.")
        if not data.stat().st_size:
            raise DataError(f"{data} is empty. {again}")
        tokens, size = count_tokens(idx)
        if tokens * size != data.stat().st_size:
            raise ValueError(f"it counts {tokens:,} tokens of {size} bytes")
        found = TokenFiles(idx.with_suffix(""), tokens, checksum(idx))
    except ValueError as error:
        raise DataError(f"{idx} is no index of {data}: {error}. {again}") from error
    except OSError as error:
        raise DataError(f"{error.filename or idx} cannot be read: {error.strerror or error}. {again}") from error
    sums = _checksums(found.prefix)
    if sums and sums["idx"] != found.content:
        raise DataError(f"{idx} has changed since it was written. {again}")
    return found


def check_blocks(pair: TokenFiles) -> None:
    """Raise DataError where blocks of the `.bin` file have changed since it was written.

    Checks the first, the last and random other blocks, up to `BLOCKS_CHECKED`: all blocks of a corpus of up to a
    gigabyte.
    """
    if not (sums := _checksums(pair.prefix)):
        return
    data, block, known = Path(f"{pair.prefix}.bin"), sums["block"], sums["bin"]
    chosen = {0, len(known) - 1, *random.SystemRandom().sample(range(len(known)), min(len(known), BLOCKS_CHECKED - 2))}
    with data.open("rb") as stream:
        for number in sorted(chosen if len(known) > BLOCKS_CHECKED else range(len(known))):
            stream.seek(number * block)
            if hashlib.sha256(stream.read(block)).hexdigest() != known[number]:
                where = f"between the bytes {number * block:,} and {(number + 1) * block:,}"
                raise DataError(f"{data} has changed since it was written, {where}. Prepare the corpus again.")


def check_content(prefix: str | Path, content: str) -> None:
    """Raise DataError where the pairs at `prefix` are not those for which `prepare` returned `content`."""
    known = [_checksums(Path(f"{prefix}.{split}")) for split in SPLITS if _file(prefix, split, "json").exists()]
    if known and content_of(sums["content"] for sums in known) != content:
        raise DataError(f"{prefix} is not the corpus that this run prepared. Prepare it again.")


def content_of(splits: Iterable[str]) -> str:
    """Return the content hash of a whole corpus from those of its splits."""
    return hashlib.sha256("".join(splits).encode()).hexdigest()


def _checksums(prefix: Path) -> dict[str, Any]:
    """Return the checksums beside a pair; empty where there is no such file. Raises DataError where it is damaged."""
    file, data = Path(f"{prefix}.json"), Path(f"{prefix}.bin")
    if not file.exists():
        return {}
    sums = read_json(file)
    match sums:
        case {"content": str(), "idx": str(), "block": int(block), "bin": [*known]} if 0 < block <= BLOCK:
            if data.is_file() and len(known) == -(-data.stat().st_size // block):
                return sums
    raise DataError(f"{file} holds no checksums of {data}. Prepare the corpus again.")


def _file(prefix: str | Path, split: str, kind: str) -> Path:
    return Path(f"{prefix}.{split}.{kind}")
