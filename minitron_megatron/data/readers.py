"""The documents of a text file, by its format."""

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
"""Length of a line or document above which the file is taken for something else: a token's place is an int32."""
MOST_KEYS, MOST_KEY_CHARS = 8, 40
"""Keys of a line that a message names."""

HALF_SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair, which JSON can hold and UTF-8 cannot."""
DECODER = json.JSONDecoder(parse_int=float)  # an int of 5,000 digits is an error, and nobody reads these numbers
JSON_TYPES = {type(None): "null", bool: "a boolean", float: "a number", str: "text", list: "a list", dict: "an object"}


class Document(NamedTuple):
    text: str
    source_bytes: int
    """How much of its file it took up."""
    place: str
    """The file and the line where it begins."""
    replaced: int = 0
    """Halves of surrogate pairs, in the place of each of which U+FFFD stands."""


def json_lines(file: Path, text_key: str, separator: str) -> Iterator[Document]:
    """A document a line, the text under the key `text_key` of a JSON object."""
    with file.open("rb") as stream:
        for number, line in enumerate(iter(partial(stream.readline, MOST_CHARS + 1), b""), 1):
            place = f"{file}:{number}"
            if len(line) > MOST_CHARS:
                raise _too_long(place)
            if line.isspace():
                continue
            try:
                content = line.decode("utf-8-sig")  # files with byte order marks may have been put together
            except UnicodeDecodeError as error:
                raise _not_utf8(place, line, error) from error
            if content.strip():
                text = _text(content, text_key, place)
                halves = HALF_SURROGATE.subn("\ufffd", text) if "\\u" in content else (text, 0)
                yield Document(halves[0], len(line), place, halves[1])


def _text(line: str, key: str, place: str) -> str:
    try:
        value = DECODER.decode(line)
        twice = line.count(f'"{key}"') > 1 and isinstance(value, dict) and _is_repeated(line, key)
    except RecursionError as error:
        raise DataError(f"{place} is nested too deeply to be read. Correct the line, or remove it.") from error
    except ValueError as error:
        raise DataError(f"{place} is not valid JSON: {error}. Correct the line, or remove it.") from error
    if isinstance(value, dict) and isinstance(value.get(key), str) and not twice:
        return value[key]
    start = f"{place} has no text under the key {key!r}"
    if twice:
        raise DataError(f"{place} has the key {key!r} twice. Keep one of them.")
    if not isinstance(value, dict):
        raise DataError(f"{start}; it holds {JSON_TYPES[type(value)]}. Each line must be an object.")
    if key in value:
        kind = JSON_TYPES[type(value[key])]
        raise DataError(f"{start}: its value is {kind}. Remove the line, or set data.text_key to another key.")
    raise DataError(f"{start}; it holds {_keys(value)}. Set data.text_key to the right one, of the outermost object.")


def _is_repeated(line: str, key: str) -> bool:
    """Whether the outermost object has the key more than once, of which Python's reader would take the last."""
    pairs = json.JSONDecoder(parse_int=float, object_pairs_hook=list).decode(line)
    return [name for name, _ in pairs].count(key) > 1


def _keys(value: dict[str, Any]) -> str:
    names = [repr(name if len(name) <= MOST_KEY_CHARS else name[:MOST_KEY_CHARS] + "...") for name in value]
    more = f" and {len(names) - MOST_KEYS} more" if len(names) > MOST_KEYS else ""
    return f"the keys {', '.join(names[:MOST_KEYS])}{more}" if names else "no keys"


def parted_text(file: Path, text_key: str, separator: str) -> Iterator[Document]:
    """The file's parts between separators, without the newlines around them; the whole file where there is none."""
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
    ".txt": parted_text,
}
"""Suffix, in any case -> reader: another format is another line."""


def reader_of(file: Path) -> Reader | None:
    """Return what reads a file, by its name; None where nothing does."""
    return next((reader for suffix, reader in READERS.items() if file.name.lower().endswith(suffix)), None)


def documents(file: Path, text_key: str, separator: str) -> Iterator[Document]:
    """The documents of a file that are not blank. DataError where there are none, or where one cannot be read."""
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
    """The error for a file that is not UTF-8: what a text stream knows of the place is relative to its buffer."""
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return _not_utf8(f"{file}:{number}", line, error)
    return DataError(f"{file} changes while it is read. Let what writes it end first.")


def _not_utf8(place: str, line: bytes, error: UnicodeDecodeError) -> DataError:
    sixteen = line.startswith((b"\xff\xfe", b"\xfe\xff"))
    how = " from UTF-16 (iconv -f UTF-16 -t UTF-8)" if sixteen else ""
    return DataError(f"{place} is not UTF-8: {error.reason} at byte {error.start} of the line. Convert the file{how}.")


def _too_long(place: str) -> DataError:
    return DataError(
        f"{place} begins a document of more than {MOST_CHARS:,} characters. Split it, or set data.separator."
    )
