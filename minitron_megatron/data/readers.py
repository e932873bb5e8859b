"""Readers of the documents of a file, by its format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import BinaryIO

from ..errors import DataError
from .columns import arrow_rows, parquet_rows
from .document import MOST_CHARS, Document, Fields, not_utf8, too_long
from .json_text import json_lines, json_records
from .streams import COMPRESSIONS, DAMAGED, opened

__all__ = ["FORMATS", "documents", "is_compact", "reader_of"]

CHUNK_CHARS = 1 << 20


def separated_text(stream: BinaryIO, file: Path, fields: Fields) -> Iterator[Document]:
    """Yield the parts of the file between separators, stripped of newlines at their ends."""
    if fields.form != "text":
        raise DataError(f"{file} is plain text and holds no chats. Give .jsonl, .json, .parquet or .arrow.")
    rest, line, separator = "", 1, fields.separator
    text = TextIOWrapper(stream, encoding="utf-8-sig")
    while chunk := text.read(max(CHUNK_CHARS, len(rest) // 4)):  # a long part is copied a few times only
        *whole, rest = (rest + chunk).split(separator)
        for part in whole:
            yield _part(part, file, line)
            line += part.count("\n") + separator.count("\n")
        if len(rest) > MOST_CHARS:
            raise too_long(f"{file}:{line}")
    yield _part(rest, file, line)


def _part(part: str, file: Path, line: int) -> Document:
    begins = part.lstrip("\n")
    return Document(begins.rstrip("\n"), len(part.encode()), f"{file}:{line + len(part) - len(begins)}")


Reader = Callable[[Path, Fields], Iterator[Document]]
"""(file, fields) -> its documents, blank ones included."""


def _of_stream(read: Callable[[BinaryIO, Path, Fields], Iterator[Document]]) -> Reader:
    """Return the reader of files, compressed or not, that a reader of streams makes."""

    def reader(file: Path, fields: Fields) -> Iterator[Document]:
        with opened(file) as content:
            before = 0
            for document in read(content.stream, file, fields):
                if content.position:
                    before, size = content.position(), content.position() - before
                    document = document._replace(source_bytes=size)
                yield document

    return reader


TEXT: dict[str, Reader] = {
    ".jsonl": _of_stream(json_lines),
    ".json": _of_stream(json_records),
    ".txt": _of_stream(separated_text),
}
FORMATS: dict[str, Reader] = {**TEXT, ".parquet": parquet_rows, ".arrow": arrow_rows}
"""Suffix (in any case) -> reader. Add a line to add a format. Text may also be compressed (`COMPRESSIONS`)."""

READERS = FORMATS | {suffix + packed: reader for suffix, reader in TEXT.items() for packed in COMPRESSIONS}


def _suffix(file: Path) -> str | None:
    return next((suffix for suffix in READERS if file.name.lower().endswith(suffix)), None)


def reader_of(file: Path) -> Reader | None:
    """Return the reader for a file's suffix; None where there is none."""
    suffix = _suffix(file)
    return READERS[suffix] if suffix else None


def is_compact(file: Path) -> bool:
    """Return whether the text of a file may have more bytes than the file."""
    return _suffix(file) not in TEXT


def documents(file: Path, fields: Fields) -> Iterator[Document]:
    """Yield the documents of a file that are not blank. Raises DataError where there is none, or one is unreadable."""
    reader, last = reader_of(file), ""
    assert reader is not None
    try:
        for document in reader(file, fields):
            if document.text and not document.text.isspace():
                last = document.place
                yield document
    except UnicodeDecodeError as error:
        raise _first_wrong_line(file) from error
    except (OSError, *DAMAGED) as error:
        if is_compact(file) and not (isinstance(error, OSError) and error.errno):
            where = f"after the document at {last}" if last else "near its beginning"
            raise DataError(f"{file} is cut off or damaged {where}: {error}. Copy it again.") from error
        raise DataError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if not last:
        raise DataError(f"{file} holds no documents. Remove it, or fill it.")


def _first_wrong_line(file: Path) -> DataError:
    """Return the error for a file that is not UTF-8, with its first wrong line.

    The file is read again, since the text stream's error gives a position in its buffer only.
    """
    with opened(file) as content:
        for number, line in enumerate(content.stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return not_utf8(f"{file}:{number}", line, error)
    return DataError(f"{file} changes while it is read. Wait until the process that writes it has ended.")
