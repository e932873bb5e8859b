"""Readers of the documents of a text file, by its format."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError

__all__ = ["HALF_SURROGATE", "READERS", "Document", "documents", "reader_of"]

CHUNK_CHARS = 1 << 26
MOST_CHARS = 1 << 30
"""Maximum characters of a line or document; a longer one is refused, since lengths are stored as int32."""
MOST_KEYS, MOST_KEY_CHARS = 8, 40
"""Maximum number of keys of a line that a message lists, and of characters of each."""

HALF_SURROGATE = re.compile("[\ud800-\udfff]")
"""Unpaired UTF-16 surrogate, which JSON can encode and UTF-8 cannot."""
DECODER = json.JSONDecoder(parse_int=float)  # Python refuses to parse an int of 5,000 digits
JSON_TYPES = {type(None): "null", bool: "a boolean", float: "a number", str: "text", list: "a list", dict: "an object"}


class Document(NamedTuple):
    text: str
    source_bytes: int
    """Bytes of the document in its file."""
    place: str
    """File and line where the document begins."""
    replaced: int = 0
    """Number of unpaired surrogates that were replaced by U+FFFD."""


def json_lines(file: Path, text_key: str, separator: str) -> Iterator[Document]:
    """Yield one document per line: the text under the key `text_key` of a JSON object."""
    with file.open("rb") as stream:
        for number, line in enumerate(iter(partial(stream.readline, MOST_CHARS + 1), b""), 1):
            place = f"{file}:{number}"
            if len(line) > MOST_CHARS:
                raise _too_long(place)
            if line.isspace():
                continue
            try:
                content = line.decode("utf-8-sig")  # any line may have a byte order mark: files are concatenated
            except UnicodeDecodeError as error:
                raise _not_utf8(place, line, error) from error
            if content.strip():
                text = _text(content, text_key, place)
                halves = HALF_SURROGATE.subn("\ufffd", text) if "\\u" in content else (text, 0)
                yield Document(halves[0], len(line), place, halves[1])


def _text(line: str, key: str, place: str) -> str:
    try:
        value = DECODER.decode(line)
        repeated = line.count(f'"{key}"') > 1 and isinstance(value, dict) and _is_repeated(line, key)
    except RecursionError as error:
        raise DataError(f"{place} is nested too deeply to be read. Correct the line, or remove it.") from error
    except ValueError as error:
        raise DataError(f"{place} is not valid JSON: {error}. Correct the line, or remove it.") from error
    if isinstance(value, dict) and isinstance(value.get(key), str) and not repeated:
        return value[key]
    start = f"{place} has no text under the key {key!r}"
    if repeated:
        raise DataError(f"{place} has the key {key!r} twice. Keep one of them.")
    if not isinstance(value, dict):
        raise DataError(f"{start}; it holds {JSON_TYPES[type(value)]}. Each line must be an object.")
    if key in value:
        kind = JSON_TYPES[type(value[key])]
        raise DataError(f"{start}: its value is {kind}. Remove the line, or set data.text_key to another key.")
    raise DataError(f"{start}; it holds {_keys(value)}. Set data.text_key to the right key of the outermost object.")


def _is_repeated(line: str, key: str) -> bool:
    """Return whether the outermost object has the key more than once; Python's reader would silently take the last."""
    pairs = json.JSONDecoder(parse_int=float, object_pairs_hook=list).decode(line)
    return [name for name, _ in pairs].count(key) > 1


def _keys(value: dict[str, Any]) -> str:
    names = [repr(name if len(name) <= MOST_KEY_CHARS else name[:MOST_KEY_CHARS] + "...") for name in value]
    more = f" and {len(names) - MOST_KEYS} more" if len(names) > MOST_KEYS else ""
    return f"the keys {', '.join(names[:MOST_KEYS])}{more}" if names else "no keys"


def separated_text(file: Path, text_key: str, separator: str) -> Iterator[Document]:
    """Yield the parts of the file between separators, stripped of newlines at their ends."""
    rest, line = "", 1
    with file.open(encoding="utf-8-sig") as stream:
        while chunk := stream.read(CHUNK_CHARS):
            *whole, rest = (rest + chunk).split(separator)
            for part in whole:
                yield _part(part, file, line)
                line += part.count("\n") + separator.count("\n")
            if len(rest) > MOST_CHARS:
                raise _too_long(f"{file}:{line}")
    yield _part(rest, file, line)


def _part(part: str, file: Path, line: int) -> Document:
    begins = part.lstrip("\n")
    return Document(begins.rstrip("\n"), len(part.encode()), f"{file}:{line + len(part) - len(begins)}")


Reader = Callable[[Path, str, str], Iterator[Document]]
"""(file, text_key, separator) -> its documents, blank ones included."""

READERS: dict[str, Reader] = {
    ".jsonl": json_lines,
    ".txt": separated_text,
}
"""Suffix (in any case) -> reader. Add a line to add a format."""


def reader_of(file: Path) -> Reader | None:
    """Return the reader for a file's suffix; None where there is none."""
    return next((reader for suffix, reader in READERS.items() if file.name.lower().endswith(suffix)), None)


def documents(file: Path, text_key: str, separator: str) -> Iterator[Document]:
    """Yield the documents of a file that are not blank. Raises DataError where there is none, or one is unreadable."""
    reader, found = reader_of(file), False
    assert reader is not None
    try:
        for document in reader(file, text_key, separator):
            if document.text and not document.text.isspace():
                found = True
                yield document
    except UnicodeDecodeError as error:
        raise _first_wrong_line(file) from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror or error}.") from error
    if not found:
        raise DataError(f"{file} holds no documents. Remove it, or fill it.")


def _first_wrong_line(file: Path) -> DataError:
    """Return the error for a file that is not UTF-8, with its first wrong line.

    The file is read again, since the text stream's error gives a position in its buffer only.
    """
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return _not_utf8(f"{file}:{number}", line, error)
    return DataError(f"{file} changes while it is read. Wait until the process that writes it has ended.")


def _not_utf8(place: str, line: bytes, error: UnicodeDecodeError) -> DataError:
    sixteen = line.startswith((b"\xff\xfe", b"\xfe\xff"))
    how = " from UTF-16 (iconv -f UTF-16 -t UTF-8)" if sixteen else ""
    return DataError(f"{place} is not UTF-8: {error.reason} at byte {error.start} of the line. Convert the file{how}.")


def _too_long(place: str) -> DataError:
    return DataError(
        f"{place} begins a document of more than {MOST_CHARS:,} characters. Split it, or set data.separator."
    )
