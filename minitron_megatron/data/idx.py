"""megatron-core's `.idx` files: writing, and validation, since megatron-core's own reader trusts them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["count_tokens", "read_index", "token_type", "write_index"]

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, dtype code of the tokens, number of sequences, number of document boundaries (documents + 1)."""
TYPES: dict[int, type[np.integer]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
"""megatron-core's code of an integer type -> the type; 6 and 7 are floats."""
PIECE = 1 << 20
"""Sequences checked at a time."""


def count_tokens(idx: Path) -> tuple[int, int]:
    """Return the number of tokens of an index, and the bytes per token.

    Raises ValueError where its counts, lengths, pointers and document boundaries do not fit the file or each other. The
    memory used does not grow with the file.
    """
    with idx.open("rb") as stream:
        head = stream.read(HEADER.size)
    if len(head) < HEADER.size:
        raise ValueError("it is shorter than its header")
    magic, version, code, sequences, ends = HEADER.unpack(head)
    if magic != MAGIC or version != 1:
        raise ValueError("it does not begin with an index header")
    if code not in TYPES:
        raise ValueError(f"its tokens are not of an integer type (code {code})")
    if idx.stat().st_size != HEADER.size + 12 * sequences + 8 * ends or not ends:
        raise ValueError(f"its size does not fit its {sequences} sequences and {ends} document boundaries")
    lengths, pointers, documents = _mapped(idx, sequences)
    tokens, size = 0, np.dtype(TYPES[code]).itemsize
    for at in range(0, sequences, PIECE):
        piece = lengths[at : at + PIECE].astype(np.int64)
        expected = (tokens + np.cumsum(piece) - piece) * size
        if (piece < 0).any() or (pointers[at : at + PIECE] != expected).any():
            raise ValueError("its lengths and pointers do not fit each other")
        tokens += int(piece.sum())
    rises = all((np.diff(documents[at : at + PIECE + 1]) >= 0).all() for at in range(0, ends, PIECE))
    if documents[0] != 0 or documents[-1] != sequences or not rises:
        raise ValueError("its document boundaries do not rise from 0 to the number of sequences")
    return tokens, size


class Index(NamedTuple):
    """Content of an index, mapped into memory."""

    lengths: NDArray[np.int32]
    """Tokens of each sequence."""
    pointers: NDArray[np.int64]
    """Byte of the `.bin` file at which each sequence begins."""
    documents: NDArray[np.int64]
    """Number of sequences before each document, and in all."""


def read_index(idx: Path) -> Index:
    """Return the content of an index that has passed `count_tokens`."""
    with idx.open("rb") as stream:
        *_, sequences, _ = HEADER.unpack(stream.read(HEADER.size))
    return _mapped(idx, sequences)


def write_index(idx: Path, lengths: NDArray[np.int32], kind: np.dtype) -> None:
    """Write the index of documents of these lengths, each one sequence. kind: type of the tokens."""
    [code] = (code for code, known in TYPES.items() if kind == known)
    sizes = lengths.astype(np.int64)
    with idx.open("wb") as stream:
        stream.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1))
        for part in (lengths, (np.cumsum(sizes) - sizes) * kind.itemsize, np.arange(len(lengths) + 1)):
            part.tofile(stream)


def token_type(idx: Path) -> type[np.integer]:
    """Return the type of the tokens of an index that has passed `count_tokens`."""
    with idx.open("rb") as stream:
        return TYPES[HEADER.unpack(stream.read(HEADER.size))[2]]


def _mapped(idx: Path, sequences: int) -> Index:
    raw = np.memmap(idx, np.uint8, mode="r", offset=HEADER.size)
    lengths, pointers = raw[: 4 * sequences].view("<i4"), raw[4 * sequences : 12 * sequences].view("<i8")
    return Index(lengths, pointers, raw[12 * sequences :].view("<i8"))
