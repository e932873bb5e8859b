"""Tasks that are conversations: their questions come from local files and always go through the chat template."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from typing_extensions import TypedDict

from ...errors import DataError
from ...events import Listener
from ...files import check_as, parse_json, read_text, whole_file
from ..local import Row, read_rows
from .judge import Judge

__all__ = [
    "Answered",
    "ChatTask",
    "Graded",
    "Message",
    "Question",
    "mean",
    "means_by_group",
    "read_records",
    "the_file",
    "write_lines",
]


RecordT = TypeVar("RecordT")


class Message(TypedDict):
    """One message of a conversation, in the form that chat templates take."""

    role: str
    content: str


@dataclass(frozen=True)
class Question:
    """One question of a task: a conversation with one turn of the assistant, or several."""

    id: str
    group: str
    """Category or data set that it belongs to."""
    turns: tuple[tuple[Message, ...], ...]
    """Messages before each turn of the assistant; those of a later turn follow the answer before."""
    row: Mapping[str, Any]
    """Record of the question, with its true answers."""
    tools: Sequence[Mapping[str, object]] = ()
    """JSON schemas of the functions that the assistant may call."""
    temperature: float = 0.0
    """Sampling temperature that the task's authors use; 0 is greedy decoding."""


@dataclass(frozen=True)
class Answered:
    """A question with the model's answer in each turn."""

    question: Question
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Graded:
    """Results of a task."""

    metrics: Mapping[str, float | None]
    """Metric -> value, the task's own number first; None: not known, as the rating of answers that nobody judged."""
    lines: Sequence[Mapping[str, object]]
    """JSON of each question with its answers and grades."""
    notes: Sequence[str] = field(default=())
    """Warnings for the user."""


class ChatTask(ABC):
    """A task's files, questions and grades."""

    most_tokens: int
    """Largest number of tokens of an answer."""
    metrics: Sequence[str]
    """Names of the metrics, the task's own number first. Higher is better in all."""

    @abstractmethod
    def questions(self, folder: Path) -> list[Question]:
        """Return the questions in a task's folder. Raises DataError or FileError for missing or invalid files."""

    def check_judge(self, folder: Path) -> None:  # noqa: B027 (most tasks need no file for a judge)
        """Raise DataError or FileError if a file is missing or invalid that only a judge needs."""

    @abstractmethod
    def grade(
        self, answered: Sequence[Answered], folder: Path, judge: Judge | None, file: Path | None, listener: Listener
    ) -> Graded:
        """Grade answers. folder: the task's folder. file: JSON lines of an earlier, interrupted grading, if any."""


def read_records(path: Path, kind: type[RecordT]) -> list[RecordT]:
    """Return the records of a file, a JSON array or one object per line, each checked as a `kind` (a TypedDict).

    Raises DataError or FileError, which names the file and the record.
    """
    text = read_text(path)
    rows: list[Row] = parse_json(text, str(path)) if text.lstrip().startswith("[") else read_rows(path)
    if not rows:
        raise DataError(f"{path} holds no questions. Write one JSON object per line.")
    return [check_as(row, kind, f"{path}, record {number}") for number, row in enumerate(rows, 1)]


def the_file(folder: Path, pattern: str, example: str, source: str) -> Path:
    """Return the one file of a folder that matches a pattern. Raises DataError for none or several.

    example: a file name for the message. source: where the task's files can be had.
    """
    found = sorted(folder.glob(pattern))
    if not found:
        raise DataError(f"{folder} has no {example}. Copy it from {source}.")
    if len(found) > 1:
        raise DataError(f"{folder} has both {found[0].name} and {found[1].name}. Remove one of them.")
    return found[0]


def write_lines(path: Path, lines: Iterable[Mapping[str, object]]) -> None:
    """Write JSON lines, atomically."""
    with whole_file(path) as partial:
        partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def means_by_group(
    answered: Sequence[Answered], scores: Sequence[float], groups: Iterable[str]
) -> dict[str, float | None]:
    """Return the mean score of the questions of each group."""
    found: dict[str, list[float]] = {group: [] for group in groups}
    for each, score in zip(answered, scores, strict=True):
        found[each.question.group].append(score)
    return {group: mean(values) for group, values in found.items()}


def mean(values: Sequence[float]) -> float | None:
    """Return the mean of values; None without any."""
    return sum(values) / len(values) if values else None
