"""Messages of the harness: each warning is shown once, each error names the task and the question."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from ..errors import DataError, MinitronError, Preempted
from . import harness
from .local import LocalData

if TYPE_CHECKING:
    from lm_eval.api.task import TaskConfig

__all__ = ["named_errors", "quiet", "warn"]

OURS = ("Custom kwargs can be passed", "No chat template is set")
"""Warnings about how this package calls the harness; the user never sees them."""


@contextmanager
def quiet() -> Iterator[list[str]]:
    """Run the harness without its log and progress bars; yield a list that collects its warnings."""
    log, collector = logging.getLogger("lm_eval"), _WarningCollector()
    level, propagate = log.level, log.propagate
    log.setLevel(logging.WARNING)
    log.addHandler(collector)
    log.propagate = False
    try:
        with redirect_stderr(StringIO()), warnings.catch_warnings(record=True) as caught:
            yield collector.found
        collector.found += [str(each.message) for each in caught if issubclass(each.category, UserWarning)]
    finally:
        log.removeHandler(collector)
        log.setLevel(level)
        log.propagate = propagate


class _WarningCollector(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if not any(ours in text for ours in OURS):
            self.found.append(text)


def warn(messages: list[str]) -> None:
    """Issue the first line of each distinct warning once; warnings that differ only in the task count as equal."""
    first: dict[str, str] = {}
    counts: dict[str, int] = {}
    for text in messages:
        line = text.strip().partition("\n")[0][:300]
        kind = re.sub(r"^\[?(Task: )?[\w-]+\]?:? ?", "", line)
        first.setdefault(kind, line)
        counts[kind] = counts.get(kind, 0) + 1
    for kind, line in first.items():
        repeats = f" ({counts[kind]} times)" if counts[kind] > 1 else ""
        warnings.warn(f"lm-eval: {line}{repeats}", stacklevel=3)


@contextmanager
def named_errors(task: str = "") -> Iterator[None]:
    """Turn an error of the harness about a task's data into a DataError that names the task, the file and the question.

    Errors of this package, and errors raised inside its model, pass unchanged.
    """
    try:
        yield
    except Exception as error:  # templates and functions of tasks raise anything
        frames = []
        trace = error.__traceback__
        while trace is not None:
            frames.append(trace.tb_frame)
            trace = trace.tb_next
        ours = any(frame.f_code.co_filename == harness.__file__ for frame in frames)
        if isinstance(error, MinitronError | Preempted) or ours:
            raise
        raise DataError(_data_error(task, frames, error)) from error


def _data_error(task: str, frames: list[FrameType], error: Exception) -> str:
    from lm_eval.api.task import Task

    cause = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0][:200].rstrip('.')}"
    place = ""
    for frame in frames:
        if isinstance(owner := frame.f_locals.get("self"), Task):
            task = str(owner.config.task or task)
            for name in ("fs_doc", "doc", "test_doc"):
                place = place or _place(owner.config, frame.f_locals.get(name))
    return (
        f"task {task} cannot be built from its data{place}: {cause}. Correct or leave out this question or this task."
    )


def _place(config: TaskConfig, doc: object) -> str:
    """Return the file and number of a question in a task's local files; empty if it is not found."""
    data = config.custom_dataset
    if not isinstance(doc, dict) or not isinstance(data, LocalData):
        return ""
    for split, table in data().items():
        for number, row in enumerate(table, 1):
            if row == doc:
                return f" ({Path(data.files[split])}, question {number})"
    return ""
