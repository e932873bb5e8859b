"""A `.bin/.idx` pair on disk, in megatron-core's format: writing it whole, and finding and checking it."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from numpy.typing import DTypeLike, NDArray

from ..errors import DataError
from ..files import whole_file

__all__ = ["SPLITS", "Pair", "PairWriter", "find_pair", "pair_writers", "token_dtype"]

SPLITS = ("train", "valid")


def token_dtype(vocab: int) -> DTypeLike:
    """uint16 where every id fits, else int32, as megatron-core chooses it."""
    from megatron.core.datasets.indexed_dataset import DType

    return DType.optimal_dtype(vocab)


class PairWriter:
    """Writes documents to a pair and keeps count of them."""

    def __init__(self, bin_file: Path, dtype: DTypeLike) -> None:
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        self._builder = IndexedDatasetBuilder(str(bin_file), dtype)
        self._hash = hashlib.sha256()
        self.documents = 0
        self.tokens = 0

    def add(self, ids: NDArray) -> None:
        self._builder.add_document(ids, [len(ids)])
        self._hash.update(len(ids).to_bytes(8, "little") + ids.tobytes())
        self.documents += 1
        self.tokens += len(ids)

    def close(self, idx_file: Path) -> None:
        self._builder.finalize(str(idx_file))

    @property
    def content(self) -> str:
        """SHA-256 over the token ids and the lengths of the documents."""
        return self._hash.hexdigest()


@contextmanager
def pair_writers(out_prefix: str | Path, splits: Sequence[str], dtype: DTypeLike) -> Iterator[dict[str, PairWriter]]:
    """A writer for each of `splits`. On success their pairs, and no older ones, stand at `<out_prefix>.<split>`."""
    with ExitStack() as stack:  # leaves in reverse order: no .idx stands before all .bin do
        idx = {split: stack.enter_context(whole_file(_file(out_prefix, split, "idx"))) for split in splits}
        data = {split: stack.enter_context(whole_file(_file(out_prefix, split, "bin"))) for split in splits}
        writers = {split: PairWriter(data[split], dtype) for split in splits}
        yield writers
        for split, writer in writers.items():
            writer.close(idx[split])
        for split in SPLITS:
            for kind in ("idx", "bin"):
                _file(out_prefix, split, kind).unlink(missing_ok=True)


@dataclass(frozen=True)
class Pair:
    """A pair that was found whole."""

    prefix: Path
    tokens: int
    content: str
    """SHA-256 of the `.idx` file: of the lengths of its documents, in order."""


def find_pair(prefix: str | Path, split: str) -> Pair:
    """The pair of a split. DataError where a file of it is missing, or where the two do not belong together."""
    from megatron.core.datasets.indexed_dataset import DType, _IndexReader

    idx, data = (_file(prefix, split, kind) for kind in ("idx", "bin"))
    for file in (idx, data):
        if not file.is_file():
            raise DataError(f"There is no {file}. Prepare the corpus {prefix}, or correct its prefix.")
    if not data.stat().st_size:
        raise DataError(f"{data} is empty. Prepare the corpus {prefix} again.")
    try:
        index = _IndexReader(str(idx), multimodal=False)
        tokens = int(index.sequence_lengths.sum(dtype="int64"))
        whole = tokens * DType.size(index.dtype) == data.stat().st_size
    except (AssertionError, ValueError, struct.error):  # what mcore raises on a file that is not its own
        whole = False
    if not whole:
        raise DataError(f"{idx} is no index of {data}. Prepare the corpus {prefix} again.")
    with idx.open("rb") as stream:
        return Pair(idx.with_suffix(""), tokens, hashlib.file_digest(stream, "sha256").hexdigest())


def _file(prefix: str | Path, split: str, kind: str) -> Path:
    return Path(f"{prefix}.{split}.{kind}")
