"""Readers of the text column of Parquet and Arrow files. Rows are numbered from 0."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DataError
from .document import MOST_CHARS, Document, Fields, document_of, missing_key, not_utf8, too_long
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
    """Yield one document per row: the text in the column `text_key`."""
    parquet = pyarrow(file, "pyarrow.parquet")
    with _explained(file, "Parquet"), parquet.ParquetFile(str(file), buffer_size=BUFFER, pre_buffer=False) as table:
        _check_column(table.schema_arrow, file, fields.text_key)
        size = file.stat().st_size // max(1, table.metadata.num_rows)
        batches = table.iter_batches(batch_size=ROWS, columns=[fields.text_key])
        yield from _rows(batches, file, fields.text_key, size)


def arrow_rows(file: Path, fields: Fields) -> Iterator[Document]:
    """Yield one document per row: the text in the column `text_key`. Holds one record batch in memory."""
    arrow = pyarrow(file, "pyarrow.ipc")
    with file.open("rb") as stream:
        begins = stream.read(len(FILE_MAGIC))
    if not begins:
        return
    whole = begins == FILE_MAGIC
    with _explained(file, "Arrow"), pyarrow(file).memory_map(str(file)) as content:
        reader = arrow.open_file(content) if whole else arrow.open_stream(content)
        _check_column(reader.schema, file, fields.text_key)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if whole else reader
        yield from _rows(batches, file, fields.text_key, None)


@contextmanager
def _explained(file: Path, kind: str) -> Iterator[None]:
    """Turn pyarrow's errors into DataErrors that name the file."""
    arrow = pyarrow(file)
    try:
        yield
    except (arrow.ArrowException, OSError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise DataError(f"{file} is damaged or no {kind} file: {reason}. Copy or write it again.") from error


def _check_column(schema: Schema, file: Path, key: str) -> None:
    if schema.names.count(key) != 1:
        if key in schema.names:
            raise DataError(f"{file} has the column {key!r} twice. Keep one of them.")
        raise missing_key(str(file), key, schema.names, "column")
    arrow, kind = pyarrow(file), schema.field(key).type
    inner = kind.value_type if arrow.types.is_dictionary(kind) else kind
    if not any(fits(inner) for fits in (arrow.types.is_string, arrow.types.is_large_string)):
        raise DataError(
            f"{file} has no text in the column {key!r}: it holds {str(kind)[:80]}. Set `text_key` to a column of text."
        )


def _rows(batches: Iterable[RecordBatch], file: Path, key: str, size: int | None) -> Iterator[Document]:
    """size: bytes of a row in the file; None: the bytes that it has in memory."""
    arrow, row = pyarrow(file), 0
    for batch in batches:
        column = batch.column(batch.schema.get_field_index(key))
        if arrow.types.is_dictionary(column.type):
            column.validate(full=True)
            column = column.dictionary_decode()
        column = column.cast(arrow.large_binary())
        column.validate(full=True)  # of a damaged file, offsets may lead outside of the data
        each = size if size is not None else batch.nbytes // max(1, len(batch))
        for scalar in column:
            yield _document(scalar.as_py(), key, each, f"{file}, row {row}")
            row += 1


def _document(value: bytes | None, key: str, size: int, place: str) -> Document:
    if value is None:
        return document_of({key: None}, key, size, place)
    if len(value) > MOST_CHARS:
        raise too_long(place)
    try:
        return Document(value.decode(), size, place)
    except UnicodeDecodeError as error:
        raise not_utf8(place, value, error, "text") from error
