"""Atomic files and folders (written under a temporary name, then renamed), and checked reading: JSON is validated
against types, other files against checksums, and every error names the file."""

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
from typing import TYPE_CHECKING, Any, TypeVar

from .errors import FileError
from .wrong_values import problem_in

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = [
    "FULL",
    "MANIFEST",
    "PARTIAL",
    "check_as",
    "checksum",
    "file_marks",
    "files_below",
    "locked",
    "parse_json",
    "put_in_place",
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
"""Name of the file that lists the SHA-256 of every file of its folder."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a file system that has no room."""

T = TypeVar("T")


def told_by(error: OSError) -> str:
    """Return the message for a file-system error that the user can fix, or an empty string."""
    reason = error.strerror or str(error)
    if error.errno in FULL:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{reason}. Make room, and run the same command again to resume."
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return f"{reason}. Raise the limit (ulimit -n), and run the same command again to resume."
    return f"{_file_name(error)}: {reason}. Correct the path or its permissions." if error.filename is not None else ""


def _file_name(error: OSError) -> str:
    name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else str(error.filename)
    return name if len(name) <= 300 else f"{name[:297]}..."


@contextmanager
def _naming(path: Path, action: str, *, only_below: Path | None = None) -> Iterator[None]:
    """Turn an OSError of the block into a FileError that names `path` and says that it cannot be `action` (a
    participle). only_below: leave errors about paths outside of this one alone."""
    try:
        yield
    except OSError as error:
        if only_below is not None and not str(error.filename or "").startswith(str(only_below)):
            raise
        advice = " Make room, and run the same command again to resume." if error.errno in FULL else ""
        raise FileError(f"{path} cannot be {action}: {error.strerror or error}.{advice}") from error
    except ValueError as error:
        if "null byte" not in str(error):
            raise
        raise FileError(f"{str(path)!r} cannot be {action}: a path cannot contain a NUL character.") from error


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to; on success it is renamed to `path`, on failure removed.

    Raises FileError where `path` cannot be written.
    """
    partial = path.with_name(path.name + PARTIAL)
    with _naming(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _naming(path, "written", only_below=partial):
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
    """Yield an empty temporary folder beside `path` to fill; on success it replaces `path`, on failure it is removed.

    The replacement is atomic; where it cannot be (`put_in_place`), the next `whole_folder` of this path first moves the
    old folder back. Raises FileError where `path` cannot be written.
    """
    partial = path.with_name(path.name + PARTIAL)
    with _naming(path, "written"):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        _put_back(path)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    try:
        with _naming(path, "written", only_below=partial):
            yield partial
        with _naming(path, "written"):
            put_in_place(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def put_in_place(partial: Path, path: Path) -> None:
    """Rename a complete folder to `path`, and remove the folder that was there.

    Atomic, except on a file system that cannot swap two names (NFS): there a kill between two renames leaves the old
    folder as `path.old`. Raises OSError.
    """
    try:
        if not path.exists():
            partial.rename(path)
        elif not _exchange(partial, path):
            path.rename(_old(path))
            partial.rename(path)
    finally:
        _put_back(path)
        shutil.rmtree(partial, ignore_errors=True)


def _old(path: Path) -> Path:
    return path.with_name(path.name + OLD)


def _put_back(path: Path) -> None:
    """Move `path.old` back to `path` if `path` does not exist; otherwise remove it."""
    old = _old(path)
    if old.exists() and not path.exists():
        old.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names atomically by Linux's renameat2(2); return False where the OS or file system lacks it."""
    try:
        swap = ctypes.CDLL(None).renameat2
    except AttributeError:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(swap(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


# ------------------------------------------------------------------------------------------------------------- JSON


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON, atomically. JSON has neither NaN nor infinity: they become null."""
    text = json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)
    with whole_file(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file. Raises FileError where it cannot be read or is not UTF-8."""
    try:
        with _naming(path, "read"):
            return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not UTF-8: {error.reason} at byte {error.start}.") from error


def read_json(path: Path) -> Any:
    """Return the value of a JSON file. Raises FileError where it cannot be read or is not JSON."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str, where: str) -> Any:
    """Return the value of a JSON text. Raises FileError, which names `where`, if it is not JSON."""
    try:
        value = json.loads(text)
        for problem in _not_finite(value):
            raise ValueError(f"{problem}, and JSON's numbers are finite")
        return value
    except RecursionError as error:
        raise FileError(f"{where} is nested too deeply to be read.") from error
    except ValueError as error:  # not JSON, or a number of thousands of digits
        raise FileError(f"{where} is not JSON: {str(error)[:200]}.") from error


def _not_finite(value: object, place: str = "") -> Iterator[str]:
    """Yield the place and value of every NaN and infinity, which Python reads beyond JSON's own numbers."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{place or 'it'} is {value}"
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _not_finite(inner, f"{place}.{key}" if place else str(key))


def read_as(path: Path, kind: type[T]) -> T:
    """Return the content of a JSON file as a `kind` (a dataclass, a TypedDict, or a container of them), strictly.

    Raises FileError, which names the file and the wrong value in it.
    """
    return check_as(read_json(path), kind, str(path))


def check_as(value: object, kind: type[T], where: str) -> T:
    """Return a JSON value as a `kind`, strictly. Raises FileError, which names `where` and the wrong value."""
    from pydantic import ValidationError

    hashable: Any = kind
    try:
        found: T = _adapter(hashable).validate_json(json.dumps(value), strict=True)
        return found
    except RecursionError as error:
        raise FileError(f"{where} is nested too deeply to be read.") from error
    except ValidationError as error:
        problem = problem_in(value, error.errors(include_url=False))
        raise FileError(f"{where} does not hold what it should: {problem}.") from error


@cache
def _adapter(kind: type[T]) -> TypeAdapter[T]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


# -------------------------------------------------------------------------------------------------------- checksums


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, read as a stream. Raises FileError where it cannot be read."""
    with _naming(path, "read"), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(path: Path, files: Iterable[Path], known: Mapping[str, str] | None = None) -> None:
    """Write the SHA-256 of `files` as JSON at `path`, by file name relative to its folder.

    known: further entries, already computed.
    """
    found = {str(file.relative_to(path.parent)): checksum(file) for file in files}
    write_json(path, dict(sorted({**found, **(known or {})}.items())))


def verify_checksums(path: Path, *, share: tuple[int, int] = (0, 1)) -> None:
    """Raise FileError, which names the file, where one is missing or has changed since `write_checksums`.

    share: (index, count) of the share of the files to read; files are dealt out by size, so that several processes can
    divide the work. Every process checks that all files exist.
    """
    known = read_as(path, dict[str, str])
    sizes = {name: _size(path, name, digest) for name, digest in known.items()}
    for name in sorted(known, key=lambda name: (-sizes[name], name))[share[0] :: share[1]]:
        if checksum(path.parent / name) != known[name]:
            raise FileError(f"{path.parent / name} has changed since it was written: {path.name} has another checksum.")


def _size(manifest: Path, name: str, digest: str) -> int:
    inside = Path(name)
    if inside.is_absolute() or ".." in inside.parts or not re.fullmatch("[0-9a-f]{64}", digest):
        raise FileError(f"{manifest} is not a list of checksums: its entry for {name!r} is {digest[:70]!r}.")
    file = manifest.parent / inside
    with _naming(file, "read"):
        if not file.is_file():
            raise FileError(f"{file} is missing, although {manifest.name} beside it lists it.")
        return file.stat().st_size


def files_below(folder: Path) -> list[Path]:
    """Return all files below a folder (everything that is not itself a folder), sorted by name.

    Links to folders are followed, but no folder is entered twice. Raises FileError where a folder cannot be read.
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


def file_marks(paths: Iterable[Path]) -> list[list[str | int]]:
    """Return name, size and modification time of files and of all files in folders: a cheap test for changes."""
    files = [file for path in paths for file in (files_below(path) if path.is_dir() else [path]) if file.is_file()]
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


@contextmanager
def locked(path: Path, *, shared: bool = False) -> Iterator[bool]:
    """Advisory lock on a file; yields whether it was acquired. shared=True takes a read lock.

    The lock ends with the block or the process; forked processes do not inherit it. On a file system without locks it
    is always acquired. Raises FileError where the file cannot be opened.
    """
    with _naming(path, "written"):
        file = path.open("a+")
    with file:
        try:
            fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            acquired = True
        except OSError as error:
            acquired = error.errno not in (errno.EACCES, errno.EAGAIN)
        yield acquired
