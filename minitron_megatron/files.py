"""Files and folders that are whole or absent (written beside their final name, then renamed), and read with an error
that names them: JSON through types, anything else by its checksum."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from .errors import FileError

__all__ = [
    "MANIFEST",
    "PARTIAL",
    "check_as",
    "checksum",
    "file_marks",
    "files_below",
    "locked",
    "read_as",
    "read_json",
    "read_text",
    "told_by",
    "verify_checksums",
    "whole_file",
    "whole_folder",
    "write_checksums",
    "write_json",
]

PARTIAL, OLD = ".partial", ".old"
MANIFEST = "checksums.json"
"""The SHA-256 of each file of the folder that it lies in."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

T = TypeVar("T")


def told_by(error: OSError) -> str:
    """Return the message for an error of the file system that the user can mend, or the empty string."""
    what = error.strerror or str(error)
    if error.errno in FULL:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{what}. Make room, and run the same command again to go on."
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{what}. Raise the limit (ulimit -n), and run the same command again to go on."
    return f"{_named(error)}: {what}. Correct the path or its permissions." if error.filename is not None else ""


def _named(error: OSError) -> str:
    name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else str(error.filename)
    return name if len(name) <= 300 else f"{name[:297]}..."


@contextmanager
def _naming(path: Path, done: str, *, mine: Path | None = None) -> Iterator[None]:
    """Raise FileError, which names `path`, for an OSError inside; mine: only for one about this path or below it."""
    try:
        yield
    except OSError as error:
        if mine is not None and not str(error.filename or "").startswith(str(mine)):
            raise
        advice = " Make room, and run the same command again to go on." if error.errno in FULL else ""
        raise FileError(f"{path} cannot be {done}: {error.strerror or error}.{advice}") from error
    except ValueError as error:
        if "null byte" not in str(error):
            raise
        raise FileError(f"{str(path)!r} cannot be {done}: a path holds no NUL.") from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` to write to; on success it takes the place of `path`, on failure it is removed.

    Raises FileError where `path` cannot be written.
    """
    partial = path.with_name(path.name + PARTIAL)
    with _naming(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _naming(path, "written", mine=partial):
            yield partial
        with _naming(path, "written"):
            with partial.open("rb") as written:
                os.fsync(written.fileno())
            partial.replace(path)
    finally:
        with _naming(path, "written"):
            partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path` to fill; on success it takes the place of `path`, else it is removed.

    The two change places at once. On a file system that cannot do that (NFS) a kill between two renames leaves the old
    one as `path.old`, and the next `whole_folder` of this path puts it back first. Raises FileError where `path` cannot
    be written.
    """
    partial, old = path.with_name(path.name + PARTIAL), path.with_name(path.name + OLD)
    with _naming(path, "written"):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        _put_back(old, path)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    try:
        with _naming(path, "written", mine=partial):
            yield partial
        with _naming(path, "written"):
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


# ------------------------------------------------------------------------------------------------------------- JSON


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as JSON, whole or not at all. JSON has no NaN and no infinity: they become null."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    with whole_file(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def read_text(path: Path) -> str:
    """Return a UTF-8 file's text. Raises FileError, which names it, where it cannot be read or is not UTF-8."""
    try:
        with _naming(path, "read"):
            return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not UTF-8: {error.reason} at byte {error.start}.") from error


def read_json(path: Path) -> Any:
    """Return the value in a JSON file. Raises FileError, which names it, where it cannot be read or is not JSON."""
    text = read_text(path)
    try:
        return json.loads(text, parse_constant=_refuse_number, parse_float=_finite_number)
    except RecursionError as error:
        raise FileError(f"{path} is nested too deeply to be read.") from error
    except ValueError as error:  # not JSON, or a number of thousands of digits
        raise FileError(f"{path} is torn or not JSON: {error}.") from error


def _refuse_number(word: str) -> float:
    raise ValueError(f"it holds {word[:20]}, and JSON's numbers are finite")


def _finite_number(digits: str) -> float:
    return number if math.isfinite(number := float(digits)) else _refuse_number(digits)


def read_as(path: Path, kind: type[T]) -> T:
    """Return what a JSON file holds as a `kind`: a dataclass, a TypedDict, or a container of them, strictly.

    Raises FileError, which names the file and what in it is wrong.
    """
    return check_as(read_json(path), kind, str(path))


def check_as(value: Any, kind: type[T], where: str) -> T:
    """Return a JSON value as a `kind`. Raises FileError, which says `where`, and what is wrong with the value."""
    from pydantic import ValidationError

    hashable: Any = kind
    try:
        found: T = _adapter(hashable).validate_json(json.dumps(value), strict=True)
        return found
    except RecursionError as error:
        raise FileError(f"{where} is nested too deeply to be read.") from error
    except ValidationError as error:
        first, more = error.errors()[0], error.error_count() - 1
        place = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ").rstrip(".")
        told = f"{place}: {message}" if place else message
        told += f", and {more} more like this" if more else ""
        raise FileError(f"{where} does not hold what it should: {told}.") from error


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


# -------------------------------------------------------------------------------------------------------- checksums


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, read as a stream. Raises FileError where it cannot be read."""
    with _naming(path, "read"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(path: Path, files: Iterable[Path], known: Mapping[str, str] | None = None) -> None:
    """Write the SHA-256 of `files` as JSON at `path`, under their names relative to its folder; known: more of them."""
    found = {str(file.relative_to(path.parent)): checksum(file) for file in files}
    write_json(path, dict(sorted({**found, **(known or {})}.items())))


def verify_checksums(path: Path, *, share: tuple[int, int] = (0, 1)) -> None:
    """Raise FileError, which names the file, where one is missing or differs from what `write_checksums` saw.

    share: (which, of how many) shares of the files to read, dealt out by size, so that several processes can divide
    the work; each looks whether all of them are there.
    """
    known = read_as(path, dict[str, str])
    sizes = {name: _size(path, name, digest) for name, digest in known.items()}
    mine = sorted(known, key=lambda name: (-sizes[name], name))[share[0] :: share[1]]
    for name in mine:
        if checksum(path.parent / name) != known[name]:
            raise FileError(f"{path.parent / name} has changed since it was written: {path.name} has another checksum.")


def _size(manifest: Path, name: str, digest: str) -> int:
    inside = Path(name)
    if inside.is_absolute() or ".." in inside.parts or not re.fullmatch("[0-9a-f]{64}", digest):
        raise FileError(f"{manifest} is no list of checksums: it says {digest[:70]!r} of {name!r}.")
    file = manifest.parent / inside
    with _naming(file, "read"):
        if not file.is_file():
            raise FileError(f"{file} is missing, and {manifest.name} beside it lists it.")
        return file.stat().st_size


def files_below(folder: Path) -> list[Path]:
    """Return everything below a folder that is not a folder, sorted by name.

    Links to folders are followed. No folder is entered twice: a link to one that was entered adds nothing. Raises
    FileError where a folder cannot be read.
    """
    found: list[Path] = []
    entered: set[tuple[int, int]] = set()

    def fresh(path: Path) -> bool:
        status = path.stat()
        known = (status.st_dev, status.st_ino) in entered
        entered.add((status.st_dev, status.st_ino))
        return not known

    def refuse(error: OSError) -> None:
        raise error

    waiting = deque([folder])
    try:
        while waiting:
            if not fresh(top := waiting.popleft()):
                continue
            for here, folders, names in os.walk(top, onerror=refuse):
                inner = [Path(here, name) for name in sorted(folders)]
                waiting.extend(path for path in inner if path.is_symlink())  # later: real names come first
                folders[:] = [path.name for path in inner if not path.is_symlink() and fresh(path)]
                found += (Path(here, name) for name in names)
    except OSError as error:
        raise FileError(f"{error.filename or folder} cannot be read: {error.strerror or error}.") from error
    return sorted(found)


def file_marks(paths: Iterable[Path]) -> list[list[Any]]:
    """Name, size and time of files, and of all that folders hold: cheap to see, and changed when they are."""
    files = [file for path in paths for file in (files_below(path) if path.is_dir() else [path]) if file.is_file()]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[bool]:
    """Yields whether the file is this process's alone until the block ends, or its process does: those that it forks do
    not hold it. shared: whether it is nobody's alone, and then nobody's can it become. Where the file system has no
    locks, it always is. Raises FileError where the file cannot be opened."""
    with _naming(path, "written"):
        file = path.open("a+")
    with file:
        try:
            fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            alone = True
        except OSError as error:
            alone = error.errno not in (errno.EACCES, errno.EAGAIN)
        yield alone
