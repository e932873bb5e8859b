"""Writing of `.bin/.idx` pairs in megatron-core's format, atomically, with checksums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import DTypeLike, NDArray

from ..errors import FileError
from ..files import checksum, told_by, whole_file
from .token_files import BLOCK, KINDS, SPLITS, split_file

__all__ = ["Blocks", "TokenFileWriter", "pair_writers", "token_dtype"]


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
                (split, kind): stack.enter_context(whole_file(split_file(out_prefix, split, kind)))
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
                    split_file(out_prefix, split, kind).unlink(missing_ok=True)
    except OSError as error:
        raise FileError(told_by(error) or f"The corpus {out_prefix} cannot be written: {error}.") from error
