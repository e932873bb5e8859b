"""Text files that the sources of a corpus name, and the other files in their folders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import DataError
from ..files import files_below
from .readers import READERS, reader_of

__all__ = ["left_out", "names", "text_files"]

ADVICE = {
    "decompress it": (".gz", ".zst", ".zstd", ".bz2", ".xz", ".lz4", ".zip", ".tar", ".tgz", ".7z"),
    "write its rows as .jsonl": (".parquet", ".arrow", ".feather", ".csv", ".tsv", ".json"),
    "rename it to .jsonl": (".ndjson", ".jsonlines", ".jl"),
}
"""Advice -> the suffixes of data in other formats to which it applies."""
UNKNOWN = "rename it to .txt or .jsonl if it is such"

NO_DATA_SUFFIXES = (
    *(".md", ".rst", ".py", ".ipynb", ".sh", ".yaml", ".yml", ".toml", ".cfg", ".ini"),
    *(".lock", ".metadata", ".md5", ".sha256", ".crc", ".png", ".jpg", ".svg"),
)
NO_DATA_NAMES = ("readme", "license", "licence", "notice", "copying", "authors", "citation", "changelog", "makefile")
"""Prefixes of file names. Files with these names or suffixes accompany corpora and hold no text of them."""

MOST_NAMES = 4
"""Maximum number of files that a message lists."""


def text_files(sources: Sequence[str | Path]) -> list[Path]:
    """Return the files to read, in the order of `sources`; those of a folder (recursively, through links) by name.

    Raises DataError where a source holds nothing to read, or a folder holds files that may be data in another format.
    """
    return [file for source in sources for file in _split(Path(source))[0]]


def left_out(sources: Sequence[str | Path]) -> list[Path]:
    """Return the files in folders of `sources` that are certainly not data, and are skipped."""
    return [file for source in sources for file in _split(Path(source))[1]]


def _split(source: Path) -> tuple[list[Path], list[Path]]:
    try:
        if not source.exists():
            raise DataError(f"There is no file or folder {source}. Correct its path.")
        return _in_folder(source) if source.is_dir() else (_file(source), [])
    except OSError as error:
        raise DataError(f"{source} cannot be read: {error.strerror or error}. Correct its path.") from error


def _file(source: Path) -> list[Path]:
    if not source.is_file():
        raise DataError(f"{source} is neither a regular file nor a folder. Write its text to a file.")
    if reader_of(source) is None:
        raise DataError(f"{source} is neither {_formats('nor')}: {_advice(source)}.")
    return [source]


def _in_folder(folder: Path) -> tuple[list[Path], list[Path]]:
    """Return a folder's files to read, and its files that hold no data.

    Raises DataError where there are other files, or none to read.
    """
    read: list[Path] = []
    left: list[Path] = []
    unread: list[Path] = []
    for file in files_below(folder):
        kind = unread if not file.is_file() else read if reader_of(file) else left if _no_data(file) else unread
        kind.append(file)
    named = names(f"{file.relative_to(folder)} ({_advice(file)})" for file in unread)
    if not read:
        held = f"; it holds {named}" if unread else ""
        raise DataError(f"The folder {folder} holds no {_formats('or')} files{held}. Name one that does.")
    if unread:
        raise DataError(
            f"The folder {folder} holds files that would be left out: {named}. "
            f"Make each of them {_formats('or')}, or move it away."
        )
    return read, left


def _no_data(file: Path) -> bool:
    """Return whether a file is certainly not part of a corpus."""
    name = file.name.lower()
    if any(name.endswith(suffixes) for suffixes in ADVICE.values()):
        return False
    hidden = name.startswith(".") and not file.suffix
    return hidden or name.endswith(NO_DATA_SUFFIXES) or name.startswith(NO_DATA_NAMES) or not file.stat().st_size


def _advice(file: Path) -> str:
    if not file.is_file():
        return "a broken link" if file.is_symlink() else "not a regular file"
    return next((advice for advice, ends in ADVICE.items() if file.name.lower().endswith(ends)), UNKNOWN)


def names(files: Iterable[str]) -> str:
    """Return the first few of `files`, separated by commas, and the number of the others."""
    listed = list(files)
    more = f" and {len(listed) - MOST_NAMES} more" if len(listed) > MOST_NAMES else ""
    return ", ".join(listed[:MOST_NAMES]) + more


def _formats(word: str) -> str:
    return f" {word} ".join(READERS)
