"""Files and folders that are whole or absent: written beside their final name, then renamed."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import FileError

__all__ = [
    "PARTIAL",
    "checksum",
    "file_marks",
    "locked",
    "read_json",
    "told_by",
    "verify_checksums",
    "whole_file",
    "whole_folder",
    "write_checksums",
    "write_json",
]

PARTIAL, OLD = ".partial", ".old"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` to write to; on success it takes the place of `path`, on failure it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path` to fill; on success it takes the place of `path`, else it is removed.

    The two change places at once. On a file system that cannot do that (NFS) a kill between two renames leaves the old
    one as `path.old`, and the next `whole_folder` of this path puts it back first.
    """
    partial, old = path.with_name(path.name + PARTIAL), path.with_name(path.name + OLD)
    _put_back(old, path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if not path.exists():
            partial.rename(path)
        elif not _exchange(partial, path):
            path.rename(old)
            partial.rename(path)
    finally:
        _put_back(old, path)
        shutil.rmtree(partial, ignore_errors=True)


def _put_back(old: Path, path: Path) -> None:
    """Gives what was set aside its name again where nothing has taken it, else removes it."""
    if old.exists() and not path.exists():
        old.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two names in one step of Linux's renameat2(2); False where the system or the file system has none."""
    try:
        swap = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(swap(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Return the value in a JSON file. Raises FileError, which names it, where it cannot be read or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise FileError(f"{path} cannot be read: {error.strerror or error}.") from error
    except RecursionError as error:
        raise FileError(f"{path} is nested too deeply to be read.") from error
    except ValueError as error:  # not UTF-8, not JSON, or a number of thousands of digits
        raise FileError(f"{path} is torn or not JSON: {error}.") from error


def told_by(error: OSError) -> str:
    """Return the message for an error of the file system that the user can mend, or the empty string."""
    what = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{what}. Make room, and run the same command again to go on."
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{what}. Raise the limit (ulimit -n), and run the same command again to go on."
    return f"{_named(error)}: {what}. Correct the path or its permissions." if error.filename is not None else ""


def _named(error: OSError) -> str:
    name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else str(error.filename)
    return name if len(name) <= 300 else f"{name[:297]}..."


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, read as a stream."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(path: Path, files: Iterable[Path]) -> None:
    """Write the SHA-256 of `files` as JSON at `path`, under their names relative to its folder."""
    write_json(path, {str(file.relative_to(path.parent)): checksum(file) for file in files})


def verify_checksums(path: Path) -> None:
    """Raise FileError, which names the file, where one is missing or differs from what `write_checksums` saw."""
    known = read_json(path)
    if not isinstance(known, dict):
        raise FileError(f"{path} holds no checksums.")
    for name, expected in known.items():
        file = path.parent / name
        try:
            found = checksum(file)
        except OSError as error:
            raise FileError(f"{file} cannot be read: {error.strerror or error}.") from error
        if found != expected:
            raise FileError(f"{file} has changed since it was written: its checksum is another than {path} says.")


def file_marks(paths: Iterable[Path]) -> list[list[Any]]:
    """Name, size and time of files, and of all that folders hold: cheap to see, and changed when they are."""
    files = [
        file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path]) if file.is_file()
    ]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[bool]:
    """Yields whether the file is this process's alone until the block ends, or its process does: those that it forks do
    not hold it. shared: whether it is nobody's alone, and then nobody's can it become. Where the file system has no
    locks, it always is."""
    with path.open("a+") as file:
        try:
            fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            alone = True
        except OSError as error:
            alone = error.errno not in (errno.EACCES, errno.EAGAIN)
        yield alone
