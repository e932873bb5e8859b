"""Readers of JSON lines and of JSON files."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import BinaryIO, TextIO

from ..errors import DataError
from .chat import record_document
from .document import HALF_SURROGATE, MOST_CHARS, Document, Fields, not_utf8, too_long

__all__ = ["json_lines", "json_records"]

CHUNK_CHARS = 1 << 16
NEAR_END = 16
"""A JSON error within this many characters of the buffer's end may only mean that a number or word goes on."""
BLANK = " \t\r\n"
MOST_DIGITS = 1000


def _number(digits: str) -> int | float:
    """Parse a whole number; Python refuses to parse an int of 5,000 digits."""
    return int(digits) if len(digits) <= MOST_DIGITS else float(digits)


class RepeatedKey(Exception):
    """An object has a key twice. Argument: the key."""


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return an object, each of whose keys counts; Python's reader would silently take the last of several."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise RepeatedKey(next(name for name in names if names.count(name) > 1))
    return found


TEXT_DECODER = json.JSONDecoder(parse_int=_number)
CHAT_DECODER = json.JSONDecoder(parse_int=_number, object_pairs_hook=_object)


def _decoder(fields: Fields) -> json.JSONDecoder:
    """Return the decoder of a record: of a chat every key counts, of text the outermost ones (`_document`)."""
    return TEXT_DECODER if fields.form == "text" else CHAT_DECODER


def json_lines(stream: BinaryIO, file: Path, fields: Fields) -> Iterator[Document]:
    """Yield one document per line: the text under the key `text_key` of a JSON object."""
    decoder = _decoder(fields)
    for number in itertools.count(1):  # enumerate would keep the last line, which may have hundreds of megabytes
        if not (line := stream.readline(MOST_CHARS + 1)):
            return
        place, size = f"{file}:{number}", len(line)
        if size > MOST_CHARS:
            raise too_long(place)
        try:
            content = line.decode("utf-8-sig")  # any line may have a byte order mark: files are concatenated
        except UnicodeDecodeError as error:
            raise not_utf8(place, line, error) from error
        del line
        if content and not content.isspace():
            try:
                value = decoder.decode(content)
            except (RecursionError, RepeatedKey) as error:
                raise _unreadable(place, error) from error
            except ValueError as error:
                raise _not_json(place, error) from error
            document = _document(value, content, fields, size, place)
            del value, content
            yield document


def json_records(stream: BinaryIO, file: Path, fields: Fields) -> Iterator[Document]:
    """Yield one document per object of a .json file: a list of objects, or objects one after the other.

    Objects may span several lines. Reads a part of the file at a time.
    """
    # pyarrow's and gzip's streams have the methods of files, which is all that TextIOWrapper needs
    text = _Text(TextIOWrapper(stream, encoding="utf-8-sig", newline=""), file, _decoder(fields))
    in_list, number = text.next() == "[", 0
    if in_list:
        text.at += 1
    while (following := text.next()) and not (in_list and following == "]"):
        if in_list and number:
            if following != ",":
                raise DataError(f"{text.place} has neither a comma nor the end of the list. Correct the file.")
            text.at += 1
            text.next()
        number += 1
        place = f"{text.place} (record {number})"
        value, content = text.value(place)
        yield _document(value, content, fields, len(content), place)
    if in_list and not following:
        raise DataError(f"{text.place} ends within a list. Copy the file again.")
    text.at += 1
    if in_list and text.next():
        raise DataError(f"{text.place} goes on after the end of the list. Correct the file.")


class _Text:
    """Text of a file, of which only the part around the current position is in memory."""

    def __init__(self, stream: TextIO, file: Path, decoder: json.JSONDecoder) -> None:
        self._stream, self._file, self._decoder = stream, file, decoder
        self._buffer, self._counted, self._line = "", 0, 1
        self.at = 0
        """Current position in the buffer."""

    @property
    def place(self) -> str:
        """File and line of the current position."""
        self._line += self._buffer.count("\n", self._counted, self.at)
        self._counted = self.at
        return f"{self._file}:{self._line}"

    def next(self) -> str:
        """Skip blanks, and return the character that follows; empty at the end."""
        while self.at < len(self._buffer) or self._fill():
            if (character := self._buffer[self.at]) not in BLANK:
                return character
            self.at += 1
        return ""

    def value(self, place: str) -> tuple[object, str]:
        """Return the JSON value that begins here, and its text."""
        while len(self._buffer) - self.at <= MOST_CHARS:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self.at)
            except (RecursionError, RepeatedKey) as error:
                raise _unreadable(place, error) from error
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos >= len(self._buffer) - NEAR_END
                if not cut or not self._fill():
                    raise _not_json(place, error.msg) from error
            else:
                content, self.at = self._buffer[self.at : end], end
                return value, content
        raise too_long(place)

    def _fill(self) -> bool:
        """Read at least as much again as is left in the buffer; return whether there was more."""
        _ = self.place  # counts the lines that leave the buffer
        left = self._buffer[self.at :]
        more = self._stream.read(max(CHUNK_CHARS, len(left)))
        self._buffer, self._counted, self.at = left + more, 0, 0
        return bool(more)


def _document(value: object, content: str, fields: Fields, size: int, place: str) -> Document:
    """content: text of the value."""
    if fields.form == "text":
        try:
            _check_once(value, content, fields.text_key)
        except (RecursionError, RepeatedKey) as error:
            raise _unreadable(place, error) from error
    document = record_document(value, fields, size, place)
    if "\\u" not in content:
        return document
    text, halves = HALF_SURROGATE.subn("\ufffd", document.text)
    return document._replace(text=text, replaced=halves)


def _check_once(value: object, content: str, key: str) -> None:
    """Raise RepeatedKey where the outermost object has a key more than once."""
    if content.count(f'"{key}"') > 1 and isinstance(value, dict):
        pairs = json.JSONDecoder(parse_int=float, object_pairs_hook=list).decode(content)
        if [name for name, _ in pairs].count(key) > 1:
            raise RepeatedKey(key)


def _unreadable(place: str, error: RecursionError | RepeatedKey) -> DataError:
    if isinstance(error, RepeatedKey):
        return DataError(f"{place} has the key {error.args[0]!r} twice. Keep one of them.")
    return DataError(f"{place} is nested too deeply to be read. Correct it, or remove it.")


def _not_json(place: str, reason: object) -> DataError:
    return DataError(f"{place} is not valid JSON: {reason}. Correct it, or remove it.")
