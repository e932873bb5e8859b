"""Documents out of text files, JSON lines and folders of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import DataError

__all__ = ["Document", "documents", "text_files"]

SUFFIXES = (".jsonl", ".txt")
CHUNK_CHARS = 1 << 26


class Document(NamedTuple):
    text: str
    source_bytes: int
    """How much of its file it took up."""


def text_files(sources: Sequence[str | Path]) -> list[Path]:
    """The files of `sources` in order, those of a folder (at any depth) by name. DataError where one gives none."""
    return [file for source in sources for file in _files(Path(source))]


def _files(source: Path) -> list[Path]:
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.suffix in SUFFIXES and path.is_file())
        if not files:
            raise DataError(f"The folder {source} holds no .jsonl or .txt files. Name one that does.")
        return files
    if not source.is_file():
        raise DataError(f"There is no file or folder {source}. Correct its path.")
    if source.suffix not in SUFFIXES:
        raise DataError(f"{source} is neither .jsonl nor .txt. Convert it to one of them.")
    return [source]


def documents(file: Path, text_key: str, separator: str) -> Iterator[Document]:
    """The documents of a file that are not blank. DataError where there are none, or where one cannot be read."""
    found = False
    try:
        for document in _json_lines(file, text_key) if file.suffix == ".jsonl" else _parts(file, separator):
            if document.text and not document.text.isspace():
                found = True
                yield document
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8: {error.reason} at byte {error.start}. Convert it.") from error
    if not found:
        raise DataError(f"{file} holds no documents. Remove it, or fill it.")


def _json_lines(file: Path, key: str) -> Iterator[Document]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.isspace():
                yield Document(_text(line, key, f"{file}:{number}"), len(line))


def _text(line: bytes, key: str, place: str) -> str:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(f"{place} is not valid JSON: {error}. Correct the line, or remove it.") from error
    if not isinstance(value, dict) or not isinstance(value.get(key), str):
        there = f"the keys {', '.join(map(repr, value))}" if isinstance(value, dict) else f"a {type(value).__name__}"
        raise DataError(f"{place} has no text under the key {key!r}; it holds {there}. Set text_key to the right one.")
    return value[key]


def _parts(file: Path, separator: str) -> Iterator[Document]:
    """The file's parts between separators, without the newlines around them; the whole file where there is none."""
    rest = ""
    with file.open(encoding="utf-8") as stream:
        while chunk := stream.read(CHUNK_CHARS):
            *whole, rest = (rest + chunk).split(separator)
            yield from map(_part, whole)
    yield _part(rest)


def _part(text: str) -> Document:
    return Document(text.strip("\n"), len(text.encode()))
