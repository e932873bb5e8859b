"""Content of files, decompressed by their suffix, with bounded memory; and the import of pyarrow."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from io import BufferedReader
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, NamedTuple, cast

from ..errors import DataError

__all__ = ["COMPRESSIONS", "DAMAGED", "Content", "opened", "pyarrow"]

COMPRESSIONS = (".gz", ".zst")
DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile)
"""Errors of a compressed file that is cut off or changed, besides OSError from pyarrow."""
BUFFER = 1 << 16


class Content(NamedTuple):
    stream: BinaryIO
    """Decompressed content."""
    position: Callable[[], int] | None
    """Number of bytes of the file read so far; None for a file that is not compressed."""


@contextmanager
def opened(file: Path) -> Iterator[Content]:
    """Open a file, which the suffixes .gz and .zst say to decompress.

    Reading raises OSError or one of `DAMAGED`, also where the file is cut off.
    """
    suffix = file.suffix.lower()
    if suffix == ".zst":
        arrow = pyarrow(file)
        with arrow.OSFile(str(file)) as raw, BufferedReader(arrow.CompressedInputStream(raw, "zstd"), BUFFER) as stream:
            yield Content(stream, raw.tell)
    else:
        with file.open("rb") as plain:
            if suffix != ".gz":
                yield Content(plain, None)
                return
            with gzip.GzipFile(fileobj=plain) as unpacked:
                yield Content(cast(BinaryIO, unpacked), plain.tell)


def pyarrow(file: Path, module: str = "pyarrow") -> ModuleType:
    """Import pyarrow, or a module of it, to read a file. Raises DataError, which says what to install."""
    try:
        return import_module(module)
    except ImportError as error:
        raise DataError(
            f"{file} can only be read with the package pyarrow: {error}. "
            "Install it (pip install 'minitron-megatron[data]')."
        ) from error
