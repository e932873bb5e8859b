"""Readers of the columns of text or of chats of Parquet and Arrow files. Rows are numbered from 0."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DataError
from .chat import CHAT_KEYS, record_document
from .document import MOST_CHARS, Document, Fields, document_of, listed, missing_key, not_utf8, too_long
from .streams import pyarrow

if TYPE_CHECKING:
    from pyarrow import RecordBatch, Schema

__all__ = ["arrow_rows", "parquet_rows"]

ROWS = 128
"""Rows of a Parquet file that are in memory at a time."""
BUFFER = 1 << 20
"""Bytes of a Parquet column that are read at a time, so that a row group of gigabytes does not fill the memory."""
FILE_MAGIC = b"ARROW1"
"""Beginning of Arrow's file format (Feather). The stream format, which `datasets` writes, has none."""


def parquet_rows(file: Path, fields: Fields) -> Iterator[Document]:
    """Yield one document per row: the text in the column `text_key`, or a chat."""
    parquet = pyarrow(file, "pyarrow.parquet")
    with _explained(file, "Parquet"), parquet.ParquetFile(str(file), buffer_size=BUFFER, pre_buffer=False) as table:
        columns = _columns(table.schema_arrow, file, fields)
        size = file.stat().st_size // max(1, table.metadata.num_rows)
        batches = table.iter_batches(batch_size=ROWS, columns=columns)
        yield from _rows(batches, columns, file, fields, size)


def arrow_rows(file: Path, fields: Fields) -> Iterator[Document]:
    """Yield one document per row: the text in the column `text_key`, or a chat. Holds one record batch in memory."""
    arrow = pyarrow(file, "pyarrow.ipc")
    with file.open("rb") as stream:
        begins = stream.read(len(FILE_MAGIC))
    if not begins:
        return
    whole = begins == FILE_MAGIC
    with _explained(file, "Arrow"), pyarrow(file).memory_map(str(file)) as content:
        reader = arrow.open_file(content) if whole else arrow.open_stream(content)
        columns = _columns(reader.schema, file, fields)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if whole else reader
        yield from _rows(batches, columns, file, fields, None)


@contextmanager
def _explained(file: Path, kind: str) -> Iterator[None]:
    """Turn pyarrow's errors into DataErrors that name the file."""
    arrow = pyarrow(file)
    try:
        yield
    except (arrow.ArrowException, OSError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise DataError(f"{file} is damaged or no {kind} file: {reason}. Copy or write it again.") from error


def _columns(schema: Schema, file: Path, fields: Fields) -> list[str]:
    """Return the columns to read. Raises DataError where there are none of the right kind."""
    if fields.form == "text":
        _check_column(schema, file, fields.text_key)
        return [fields.text_key]
    there = list(schema.names) if fields.whole else [name for name in CHAT_KEYS if name in schema.names]
    if not there or any(schema.names.count(name) > 1 for name in there):
        raise DataError(
            f"{file} holds {listed(schema.names, 'column')}, and chats have messages, or prompt and response, each "
            "once. Rename its columns."
        )
    return there


def _check_column(schema: Schema, file: Path, key: str) -> None:
    if schema.names.count(key) != 1:
        if key in schema.names:
            raise DataError(f"{file} has the column {key!r} twice. Keep one of them.")
        raise missing_key(str(file), key, schema.names, "column")
    types, kind = pyarrow(file).types, schema.field(key).type
    inner = kind.value_type if types.is_dictionary(kind) else kind
    if not any(fits(inner) for fits in (types.is_string, types.is_large_string, types.is_string_view)):
        raise DataError(
            f"{file} has no text in the column {key!r}: it holds {str(kind)[:80]}. Set `text_key` to a column of text."
        )


def _rows(
    batches: Iterable[RecordBatch], columns: list[str], file: Path, fields: Fields, size: int | None
) -> Iterator[Document]:
    """size: bytes of a row in the file; None: the bytes that it has in memory."""
    row = 0
    for batch in batches:
        each = size if size is not None else batch.nbytes // max(1, len(batch))
        if fields.form == "text":
            for text in _texts(batch, fields.text_key, file):
                yield _document(text, fields.text_key, each, f"{file}, row {row}")
                row += 1
            continue
        chosen = batch.select(columns)
        for column in chosen.columns:
            column.validate(full=True)  # of a damaged file, offsets may lead outside of the data
        for record in chosen.to_pylist():
            place = f"{file}, row {row}"
            yield record_document(_without_nulls(record, place), fields, each, place)
            row += 1


def _without_nulls(value: object, place: str) -> object:
    """Return a value of a row without the nulls of its structs: there a key that a record lacks is null."""
    if isinstance(value, dict):
        return {key: _without_nulls(held, place) for key, held in value.items() if held is not None}
    if isinstance(value, list):
        return [_without_nulls(held, place) for held in value]
    if isinstance(value, tuple):
        raise DataError(f"{place} holds an Arrow map, which a chat cannot have. Write it as a struct, or as JSON.")
    return value


def _texts(batch: RecordBatch, key: str, file: Path) -> Iterator[bytes | None]:
    """Yield the values of a column of text."""
    arrow = pyarrow(file)
    column = batch.column(batch.schema.get_field_index(key))
    if arrow.types.is_dictionary(column.type):
        column.validate(full=True)
        column = column.dictionary_decode()
    column = column.cast(arrow.large_binary())
    column.validate(full=True)
    for scalar in column:
        yield scalar.as_py()


def _document(value: bytes | None, key: str, size: int, place: str) -> Document:
    if value is None:
        return document_of({key: None}, key, size, place)
    if len(value) > MOST_CHARS:
        raise too_long(place)
    try:
        return Document(value.decode(), size, place)
    except UnicodeDecodeError as error:
        raise not_utf8(place, value, error, "text") from error
