"""Writing of `.bin/.idx` pairs in megatron-core's format: atomic, with checksums, and resumed after a kill.

The files grow in a folder `<out_prefix>.partial`. Now and then they are flushed to disk, and `progress.json` then says
how much of them counts; whatever a killed process wrote after that is cut off.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedRandom
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray
from typing_extensions import TypedDict

from ..errors import FileError, MinitronError, Preempted
from ..files import FULL, PARTIAL, checksum, read_as, write_json
from .idx import read_index, write_index
from .token_files import BLOCK, KINDS, MASK, SPLITS, find_pair, split_file

__all__ = ["PairWriters", "TokenFileWriter", "pair_writers", "token_dtype"]

SAVE_SECONDS = 30.0
"""Time between two flushes to disk: what a kill costs at most."""
PROGRESS = "progress.json"
SMALL_VOCABULARY = 65500
"""Number of tokens from which on megatron-core stores token ids as int32."""


class Progress(TypedDict):
    """Content of `progress.json`."""

    key: str
    """Checksum of all that the tokens depend on."""
    position: list[Any]
    """Place in the sources up to which documents are written, in the caller's terms."""
    documents: dict[str, int]
    """Number of documents of each split."""
    content: dict[str, str]
    """SHA-256 over their token ids and lengths."""


def token_dtype(vocab: int) -> DTypeLike:
    """Return the dtype that megatron-core chooses for token ids (`DType.optimal_dtype`), without its import."""
    return np.uint16 if vocab < SMALL_VOCABULARY else np.int32


class _Hash(Protocol):
    """A running SHA-256."""

    def update(self, data: bytes | memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


@dataclass
class Blocks:
    """SHA-256 of every `BLOCK` bytes of a stream."""

    done: list[str] = field(default_factory=list)
    _hash: _Hash = field(default_factory=hashlib.sha256)
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
    """Writer of documents to `<prefix>.bin` and of their lengths to `<prefix>.lengths`, with counts and checksums.

    types: type of each of a document's columns, which have one value a token. The second one, if there is one, goes to
    `<prefix>.mask.bin`.
    """

    def __init__(self, prefix: Path, types: Sequence[DTypeLike], documents: int) -> None:
        """documents: number of the documents already there that are kept. Raises ValueError if there are fewer."""
        self._prefix, self._types = prefix, [np.dtype(kind) for kind in types]
        self._hash, self._lengths = hashlib.sha256(), array("i")
        self._blocks = [Blocks() for _ in types]
        self.tokens = 0
        self._bins = [open(f"{place}.bin", "a+b") for place in self._places]  # noqa: SIM115
        self._sizes = open(f"{prefix}.lengths", "a+b")  # noqa: SIM115
        self._keep(documents)

    @property
    def _places(self) -> list[str]:
        """Prefix of the pair of each column."""
        return [f"{self._prefix}", f"{self._prefix}.{MASK}"][: len(self._types)]

    def _keep(self, documents: int) -> None:
        self._sizes.seek(0)
        kept = array("i", self._sizes.read(self._lengths.itemsize * documents))
        for file in self._bins:
            file.seek(0)
        for length in kept:
            parts = [file.read(length * kind.itemsize) for file, kind in self._columns]
            for place, part, kind in zip(self._places, parts, self._types, strict=True):
                if len(part) < length * kind.itemsize:
                    raise ValueError(f"{place}.bin is too short")
            self._count(parts, length)
        if self.documents < documents:
            raise ValueError(f"{self._prefix}.lengths is too short")
        for file, kind in self._columns:
            file.truncate(self.tokens * kind.itemsize)
        self._sizes.truncate(self._lengths.itemsize * documents)
        self._saved = documents

    @property
    def _columns(self) -> list[tuple[BufferedRandom, np.dtype]]:
        return list(zip(self._bins, self._types, strict=True))

    def add(self, *columns: NDArray) -> None:
        """Write a document: its token ids and, of a chat, the mark of each."""
        parts = [column.tobytes() for column in columns]
        for file, part in zip(self._bins, parts, strict=True):
            file.write(part)
        self._count(parts, len(columns[0]))

    def _count(self, parts: Sequence[bytes], length: int) -> None:
        self._hash.update(length.to_bytes(8, "little"))
        for blocks, part in zip(self._blocks, parts, strict=True):
            self._hash.update(part)
            blocks.add(part)
        self._lengths.append(length)
        self.tokens += length

    @property
    def documents(self) -> int:
        return len(self._lengths)

    def flush(self) -> None:
        """Put everything on the disk."""
        self._sizes.write(self._lengths[self._saved :].tobytes())
        self._saved = self.documents
        for file in (*self._bins, self._sizes):
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Write the indices and the checksums of all files beside the `.bin` files."""
        self.close()
        found = []
        for place, kind, blocks in zip(self._places, self._types, self._blocks, strict=True):
            write_index(Path(f"{place}.idx"), np.frombuffer(self._lengths, np.int32), kind)
            found.append({"idx": checksum(Path(f"{place}.idx")), "bin": blocks.end()})
        sums = {"content": self.content, "block": BLOCK} | found[0] | ({MASK: found[1]} if found[1:] else {})
        Path(f"{self._prefix}.json").write_text(json.dumps(sums) + "\n", encoding="utf-8")

    def close(self) -> None:
        for file in (*self._bins, self._sizes):
            file.close()

    @property
    def content(self) -> str:
        """SHA-256 over the token ids, their marks and the document lengths."""
        return self._hash.hexdigest()


class PairWriters:
    """Writers of the pairs of all splits, in a folder of their own until they are whole."""

    def __init__(self, out_prefix: str | Path, splits: Sequence[str], types: Sequence[DTypeLike], key: str) -> None:
        """types: those of a document's columns. key: checksum of all that the tokens depend on; what is there is kept
        only if it was written under it."""
        self._out, self._types, self._key = Path(out_prefix), types, key
        self.folder = Path(f"{out_prefix}{PARTIAL}")
        self.position: list[Any] = []
        """Place in the sources up to which documents were written before; empty at the beginning."""
        if not (self.folder / PROGRESS).is_file():
            self._take_back(splits)
        try:
            found = read_as(self.folder / PROGRESS, Progress)
            if found["key"] != key or set(found["documents"]) != set(splits):
                raise ValueError("it was written from other sources")
            self.writers = self._open(found["documents"])
            if found["content"] != self._content:
                raise ValueError("it has changed since it was written")
            self.position = found["position"]
        except (OSError, ValueError):  # a FileError is a ValueError
            self.restart(splits)
        self._last = time.monotonic()

    def restart(self, splits: Sequence[str]) -> None:
        """Begin with empty files."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.writers, self.position = self._open(dict.fromkeys(splits, 0)), []

    @property
    def _content(self) -> dict[str, str]:
        return {split: writer.content for split, writer in self.writers.items()}

    def _open(self, documents: Mapping[str, int]) -> dict[str, TokenFileWriter]:
        return {split: TokenFileWriter(self.folder / split, self._types, count) for split, count in documents.items()}

    def _take_back(self, splits: Sequence[str]) -> None:
        """Copy what an earlier call finished before the end of the sources, so that it goes on."""
        progress = self._progress_beside
        try:
            if not progress.is_file() or read_as(progress, Progress)["key"] != self._key:
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            for split in splits:
                pair = find_pair(split_file(self._out, split, "bin").with_suffix(""), "")
                read_index(Path(f"{pair.prefix}.idx")).lengths.tofile(self.folder / f"{split}.lengths")
                for kind in ("bin", f"{MASK}.bin")[: len(self._types)]:
                    shutil.copyfile(f"{pair.prefix}.{kind}", self.folder / f"{split}.{kind}")
            shutil.copyfile(progress, self.folder / PROGRESS)
        except (MinitronError, FileNotFoundError):
            return  # what is there is damaged, and is made anew

    @property
    def _progress_beside(self) -> Path:
        return Path(f"{self._out}.{PROGRESS}")

    def save(self, position: Sequence[object], *, every: float | None = None) -> None:
        """Put everything on the disk, if the last time was `every` seconds ago, by default `SAVE_SECONDS`."""
        if time.monotonic() - self._last < (SAVE_SECONDS if every is None else every):
            return
        for writer in self.writers.values():
            writer.flush()
        documents = {split: writer.documents for split, writer in self.writers.items()}
        progress = Progress(key=self._key, position=list(position), documents=documents, content=self._content)
        write_json(self.folder / PROGRESS, progress)
        self._last = time.monotonic()

    def finish(self, *, goes_on: bool) -> None:
        """Replace all earlier pairs at the prefix. goes_on: keep the progress, since the sources hold more."""
        for writer in self.writers.values():
            writer.finish()
        kinds = KINDS if self._types[1:] else [kind for kind in KINDS if MASK not in kind]
        files = [(kind, split) for kind in reversed(kinds) for split in self.writers]  # an .idx appears last
        for kind, split in files:
            with (self.folder / f"{split}.{kind}").open("rb") as written:
                os.fsync(written.fileno())
        for path in (self._progress_beside, *(split_file(self._out, s, k) for s in SPLITS for k in KINDS)):
            path.unlink(missing_ok=True)
        for kind, split in files:
            (self.folder / f"{split}.{kind}").replace(split_file(self._out, split, kind))
        if goes_on:
            (self.folder / PROGRESS).replace(self._progress_beside)
        shutil.rmtree(self.folder)

    def close(self, *, keep: bool) -> None:
        """Close the files. keep: leave them for the next call, which goes on with what was saved."""
        for writer in self.writers.values():
            writer.close()
        if not keep or not (self.folder / PROGRESS).is_file():
            shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def pair_writers(
    out_prefix: str | Path, splits: Sequence[str], types: Sequence[DTypeLike], key: str
) -> Iterator[PairWriters]:
    """Yield the writers of pairs at `<out_prefix>.<split>`; the block ends with their `finish`.

    After a kill, an interruption or on a full disk, what was saved is kept for the next call; after another error
    nothing is left. Raises FileError where files cannot be written.
    """
    try:
        writers = PairWriters(out_prefix, splits, types, key)
        try:
            yield writers
        except BaseException as error:
            full = isinstance(error, OSError) and error.errno in FULL
            writers.close(keep=full or isinstance(error, KeyboardInterrupt | Preempted))
            raise
    except OSError as error:
        advice = " Make room, and run the same command again to resume." if error.errno in FULL else ""
        raise FileError(f"The corpus {out_prefix} cannot be written: {error.strerror or error}.{advice}") from error
