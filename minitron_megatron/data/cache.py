"""Cache folders of megatron-core's sample indices: written once, and checked before megatron-core loads them.

megatron-core loads `.npy` files with `allow_pickle=True`: a pickle in one of them would run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..errors import DataError, FileError, MinitronError
from ..files import MANIFEST, verify_checksums, whole_folder, write_checksums
from ..parallel import fail_together, place_in_world

__all__ = ["write_once"]

MOST_HEADER = 1 << 12
"""Size limit in bytes of an array's header, which Python's parser reads; numpy writes 118."""


def write_once(folder: Path, write: Callable[[Path], object], *, first_rank: bool) -> None:
    """Let rank 0 fill `folder`, atomically, if it does not exist yet; then check it on every rank. Collective.

    Raises DataError where the folder cannot be written, where a rank does not see it, or where a file in it has changed
    or is not a plain array.
    """
    with fail_together():
        if first_rank and not folder.is_dir():
            try:
                with whole_folder(folder) as partial:
                    write(partial)
                    write_checksums(partial / MANIFEST, sorted(partial.iterdir()))
            except (OSError, FileError) as error:
                raise DataError(f"The index of samples cannot be written: {error}. Set another cache.") from error
    with fail_together():
        if not folder.is_dir():
            raise DataError(f"Not every rank sees {folder}, which rank 0 wrote. Set cache to a shared file system.")
        try:
            for file in folder.glob("*.npy"):
                _check_array(file)
            verify_checksums(folder / MANIFEST, share=place_in_world())
        except MinitronError as error:
            raise DataError(f"{error} Remove the folder {folder}: the next run makes it again.") from error


def _check_array(file: Path) -> None:
    """Raise DataError unless a file is a complete, plain array of integers, as numpy writes it."""
    try:
        if not file.is_file():
            raise ValueError("it is not a regular file")
        with file.open("rb") as stream:
            version = np.lib.format.read_magic(stream)
            if version != (1, 0):
                raise ValueError(f"its format version is {version}")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream, max_header_size=MOST_HEADER)
            held = file.stat().st_size - stream.tell()
    except Exception as error:  # numpy parses the header as Python, which may raise anything
        reason = str(error).partition("\n")[0].rstrip(".")  # numpy's second line advises to allow pickles
        raise DataError(f"{file} is not an array: {reason}.") from error
    if dtype.kind not in "iu" or fortran or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != held:
        raise DataError(f"{file} is not a whole array of integers: {shape} of {dtype} in {held} bytes.")
