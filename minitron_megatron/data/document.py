"""Document of a source, and the checks that are the same in every format."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

from ..errors import DataError
from ..wrong_values import kind_of

__all__ = [
    "HALF_SURROGATE",
    "MOST_CHARS",
    "SEPARATOR",
    "TEXT_KEY",
    "Document",
    "Fields",
    "document_of",
    "listed",
    "missing_key",
    "not_utf8",
    "too_long",
]

TEXT_KEY, SEPARATOR = "text", "<|endoftext|>"
"""Defaults of `Fields`."""

MOST_CHARS = 1 << 30
"""Maximum characters of a line or document; a longer one is refused, since lengths are stored as int32."""
MOST_KEYS, MOST_KEY_CHARS = 8, 40
"""Maximum number of keys of a record that a message lists, and of characters of each."""

HALF_SURROGATE = re.compile("[\ud800-\udfff]")
"""Unpaired UTF-16 surrogate, which JSON can encode and UTF-8 cannot."""


class Document(NamedTuple):
    text: str
    source_bytes: int
    """Bytes of the document in its file."""
    place: str
    """File and line, item or row where the document begins."""
    replaced: int = 0
    """Number of unpaired surrogates that were replaced by U+FFFD."""


class Fields(NamedTuple):
    """How the documents of a file are found."""

    text_key: str = TEXT_KEY
    """Key or column of the text."""
    separator: str = SEPARATOR
    """Text between the documents of a .txt file."""
    form: Literal["text", "chat", "preference", "prompt", "rated"] = "text"
    """Content of a record."""

    @property
    def whole(self) -> bool:
        """Whether all keys of a record are read, and not only those of a chat."""
        return self.form in ("prompt", "rated")


def document_of(record: object, key: str, size: int, place: str) -> Document:
    """Return the text under a key of a record. Raises DataError where there is none."""
    if isinstance(record, dict) and isinstance(text := record.get(key), str):
        return Document(text, size, place)
    if not isinstance(record, dict):
        raise DataError(
            f"{place} has no text under the key {key!r}; it holds {kind_of(record)}. Each record must be an object."
        )
    if key in record:
        raise DataError(
            f"{place} has no text under the key {key!r}: its value is {kind_of(record[key])}. "
            "Remove the record, or set `text_key` to another key."
        )
    raise missing_key(place, key, list(record), "key")


def missing_key(place: str, key: str, there: list[str], word: str) -> DataError:
    """Return the error for a record without the key of the text. word: `key` or `column`."""
    outermost = " of the outermost object" if word == "key" else ""
    return DataError(
        f"{place} has no text under the {word} {key!r}; it holds {listed(there, word)}. "
        f"Set `text_key` to the right {word}{outermost}."
    )


def listed(there: Iterable[str], word: str) -> str:
    """Return the first keys or columns of a record, for a message. word: `key` or `column`."""
    names = [repr(name if len(name) <= MOST_KEY_CHARS else name[:MOST_KEY_CHARS] + "...") for name in there]
    more = f" and {len(names) - MOST_KEYS} more" if len(names) > MOST_KEYS else ""
    return f"the {word}{'s' * (len(names) > 1)} {', '.join(names[:MOST_KEYS])}{more}" if names else f"no {word}s"


def not_utf8(place: str, content: bytes, error: UnicodeDecodeError, what: str = "line") -> DataError:
    """Return the error for a line or value that is not UTF-8."""
    sixteen = content.startswith((b"\xff\xfe", b"\xfe\xff"))
    how = " from UTF-16 (iconv -f UTF-16 -t UTF-8)" if sixteen else ""
    return DataError(
        f"{place} is not UTF-8: {error.reason} at byte {error.start} of the {what}. Convert the file{how}."
    )


def too_long(place: str) -> DataError:
    return DataError(
        f"{place} begins a document of more than {MOST_CHARS:,} characters. Split it, or set another `separator`."
    )
