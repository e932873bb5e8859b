"""Local files that replace a task's downloads: `FOLDER/<task>/<split>.jsonl`, read strictly."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import DataError, FileError
from ..files import parse_json

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["LocalData", "Row", "read_rows", "split_files"]

Row = dict[str, object]


def split_files(task: str, files: Path) -> dict[str, Path]:
    """Return split -> file of a task. Raises DataError if there is no file."""
    folder = files / task
    found = {path.stem: path for path in sorted(folder.glob("*.jsonl"))}
    if not found:
        raise DataError(f"{folder} has no .jsonl file. Add one for each split, such as test.jsonl.")
    return found


def read_rows(path: Path) -> list[Row]:
    """Read the JSON objects of a file, one per line. Raises DataError that names the line for anything else."""
    try:
        data = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error
    rows = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip():
            rows.append(_row(line, f"{path}, line {number}"))
    if not rows:
        raise DataError(f"{path} holds no questions. Write one JSON object per line.")
    return rows


def _row(line: bytes, place: str) -> Row:
    try:
        row = parse_json(line.decode("utf-8"), place)
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is not UTF-8. Save the file as UTF-8.") from error
    except FileError as error:
        raise DataError(str(error)) from error
    if not isinstance(row, dict):
        raise DataError(f"{place} is not a JSON object with the fields of a question. Correct it.")
    return row


@dataclass(frozen=True)
class LocalData:
    """Splits of a task from local files, in the form of the harness's `custom_dataset`."""

    files: Mapping[str, str]
    most: int | None = None
    """Number of first rows to read of each file; None: all."""

    def __call__(self, **_: object) -> dict[str, Dataset]:
        return {split: _dataset(Path(file), read_rows(Path(file))[: self.most]) for split, file in self.files.items()}


def _dataset(path: Path, rows: Sequence[Row]) -> Dataset:
    from datasets import Dataset

    names = list(dict.fromkeys(name for row in rows for name in row))
    try:
        return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names})
    except Exception as error:  # pyarrow raises anything
        raise DataError(_mixed_types(path, rows, names) or f"{path} cannot be read as a table: {error}.") from error


def _mixed_types(path: Path, rows: Sequence[Row], names: Sequence[str]) -> str | None:
    """Return a message about the first row with a field of another type than before it; None if there is none."""
    from datasets import Dataset

    def fits(name: str, count: int) -> bool:
        try:
            Dataset.from_dict({name: [row.get(name) for row in rows[:count]]})
        except Exception:  # pyarrow raises anything
            return False
        return True

    for name in names:
        if not fits(name, len(rows)):
            count = _first(lambda count, name=name: not fits(name, count), len(rows))  # type: ignore[misc]
            value = json.dumps(rows[count - 1].get(name))[:80]
            return (
                f"{path}, question {count}: the field {name} is {value}, which is not valid text or of another type "
                "than in the questions before. Give it one type in the whole file."
            )
    return None


def _first(fails: Callable[[int], bool], most: int) -> int:
    """Bisect for the smallest count in 1..`most` that fails; all larger counts fail too."""
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fails(middle) else (middle + 1, high)
    return low
