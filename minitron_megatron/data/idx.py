"""Validation of megatron-core's `.idx` files; megatron-core's own reader trusts them."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

__all__ = ["count_tokens"]

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, dtype code of the tokens, number of sequences, number of document boundaries (documents + 1)."""
TOKEN_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}
"""megatron-core's code of an integer type -> its size in bytes; 6 and 7 are floats."""
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
    if code not in TOKEN_BYTES:
        raise ValueError(f"its tokens are not of an integer type (code {code})")
    if idx.stat().st_size != HEADER.size + 12 * sequences + 8 * ends or not ends:
        raise ValueError(f"its size does not fit its {sequences} sequences and {ends} document boundaries")
    raw = np.memmap(idx, np.uint8, mode="r", offset=HEADER.size)
    lengths = raw[: 4 * sequences].view("<i4")
    pointers = raw[4 * sequences : 12 * sequences].view("<i8")
    documents = raw[12 * sequences :].view("<i8")
    tokens = 0
    for at in range(0, sequences, PIECE):
        piece = lengths[at : at + PIECE].astype(np.int64)
        expected = (tokens + np.cumsum(piece) - piece) * TOKEN_BYTES[code]
        if (piece < 0).any() or (pointers[at : at + PIECE] != expected).any():
            raise ValueError("its lengths and pointers do not fit each other")
        tokens += int(piece.sum())
    rises = all((np.diff(documents[at : at + PIECE + 1]) >= 0).all() for at in range(0, ends, PIECE))
    if documents[0] != 0 or documents[-1] != sequences or not rises:
        raise ValueError("its document boundaries do not rise from 0 to the number of sequences")
    return tokens, TOKEN_BYTES[code]
