"""Event listeners: progress on the terminal, and the lines of `metrics.jsonl`.

Knows: events, and how they are shown and written. Must not know: who sends them, or the rank (the caller gives real
listeners to rank 0 and `silent` to the others).
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich import progress as bars
from rich.console import Console
from rich.table import Column
from rich.text import Text

from .. import numbers
from ..errors import CheckpointError
from ..events import Event, Listener

__all__ = ["MetricsFile", "Progress", "fan_out", "lost_lines", "parse_line", "read_metrics"]


def fan_out(*listeners: Listener) -> Listener:
    """Return one listener that passes events to each of `listeners`, in order."""

    def listen(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return listen


def _amount(task: bars.Task) -> str:
    if task.fields["unit"] == "bytes":
        return f"{numbers.size(task.completed)} of {numbers.size(task.total)}"
    return f"{task.completed:,.0f}/{task.total:,.0f} {task.fields['unit']}"


def _speed(task: bars.Task) -> str:
    tokens = task.fields["values"].get("tokens_per_second")
    if tokens is not None:
        return f"{numbers.count(tokens)} tokens/s"
    speed = task.finished_speed or task.speed
    if not speed:
        return ""
    if task.fields["unit"] == "bytes":
        return f"{numbers.size(speed)}/s"
    return f"{f'{speed:.3g}' if speed < 1000 else numbers.count(speed)} {task.fields['unit']}/s"


def _loss(task: bars.Task) -> str:
    values = task.fields["values"]
    return f"loss {numbers.loss(values['loss'])}" if "loss" in values else ""


def _remaining(task: bars.Task) -> str:
    return f"{numbers.duration(task.time_remaining)} left" if task.time_remaining else ""


_PARTS = (_amount, _speed, _loss, _remaining)
SHORT_SECONDS = 2.0
"""Work that takes less time than this prints no plain line."""


class _Part(bars.ProgressColumn):
    """A column of the progress bar that shows one part of the line."""

    def __init__(self, part: Callable[[bars.Task], str]):
        super().__init__(Column(no_wrap=True))
        self._part = part

    def render(self, task: bars.Task) -> Text:
        return Text(self._part(task))


class Progress:
    """Shows events as progress: on a terminal, one live bar per label; otherwise plain lines.

    A label prints a plain line at most every `every_seconds`. Its last event is always shown, except that without a
    terminal a label that took less than `short_seconds` prints nothing. A label that starts over (`done` decreases)
    gets a new bar.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        every_seconds: float = 10.0,
        short_seconds: float = SHORT_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._console = console or Console()
        self._bars = bars.Progress(
            bars.TextColumn("{task.description}", markup=False, style="bold", table_column=Column(no_wrap=True)),
            bars.BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=8)),
            *map(_Part, _PARTS),
            console=self._console,
            expand=True,
            get_time=clock,
            disable=not self._console.is_terminal,
        )
        self._clock = clock
        self._every_seconds, self._short_seconds = every_seconds, short_seconds
        self._tasks: dict[str, bars.Task] = {}
        self._printed: dict[str, tuple[float, float | None]] = {}
        """Label -> (time, `done`) of its last plain line; before the first line, (start time, None)."""

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        for label, task in self._tasks.items():
            if not task.finished:
                self._print(label, wait=0.0)

    def __call__(self, event: Event) -> None:
        task = self._task(event)
        values = task.fields["values"] | event.values  # rarely measured values stay visible
        self._bars.update(task.id, completed=event.done, total=event.total, unit=event.unit, values=values)
        if self._printed[event.label][1] is None:
            self._print(event.label, wait=self._short_seconds)
        else:
            self._print(event.label, wait=0.0 if event.done >= event.total else self._every_seconds)

    def _task(self, event: Event) -> bars.Task:
        """Return the label's bar. Progress before its first event does not count for the speed."""
        task = self._tasks.get(event.label)
        if task is not None and event.done >= task.completed:
            return task
        if task is not None:
            self._bars.remove_task(task.id)
        self._bars.add_task(event.label, completed=event.done, total=event.total, unit=event.unit, values={})
        self._tasks[event.label] = self._bars.tasks[-1]
        self._printed[event.label] = -math.inf if event.done >= event.total else self._clock(), None
        return self._tasks[event.label]

    def _print(self, label: str, *, wait: float) -> None:
        """Print a plain line, if there is no terminal, `done` has changed, and the label's last line (or its start) is
        at least `wait` seconds old."""
        task, now = self._tasks[label], self._clock()
        when, done = self._printed[label]
        if self._console.is_terminal or task.completed == done or now - when < wait:
            return
        self._printed[label] = now, task.completed
        parts = [label, f"{task.percentage:.0f}%", *(part(task) for part in _PARTS)]
        self._console.print("  ".join(filter(None, parts)), markup=False, highlight=False, soft_wrap=True)


def _number(value: float) -> float | None:
    """Return a JSON number; a value that is not finite becomes null, so that every JSON parser accepts the line."""
    if isinstance(value, int):
        return value
    return float(value) if math.isfinite(value) else None


FIELDS: dict[str, type] = {"time": str, "stage": str, "unit": str, "done": int, "total": int}
"""Fields of a line of metrics other than its measurements."""


class MetricsFile:
    """Appends each event that has values as a JSON line, in one write, so that a kill truncates at most the last line.

    The first event creates the folder and removes a truncated last line of a killed run.
    """

    def __init__(self, path: Path):
        self.path = path
        self._is_open = False

    def _open(self) -> None:
        self._is_open = True
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)

    def __call__(self, event: Event) -> None:
        if not event.values:
            return
        if not self._is_open:
            self._open()
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "stage": event.label,
            "done": event.done,
            "total": event.total,
            "unit": event.unit,
            **{name: _number(value) for name, value in event.values.items()},
        }
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                text = json.dumps(line, allow_nan=False).encode() + b"\n"
                if os.write(handle, text) < len(text):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(handle)
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be written: {error}. Make room, and run the same command again to resume."
            ) from error


MetricsLine = dict[str, Any]
"""Line of `metrics.jsonl`: `stage`, `done`, `total`, `unit`, and the measured values by name."""


def parse_line(text: bytes) -> MetricsLine | None:
    """Return a line of a metrics file; None if it is truncated or is not a line of metrics."""
    try:
        line = json.loads(text, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict):
        return None
    known = all(isinstance(line.get(name, fits()), fits) for name, fits in FIELDS.items())
    values = (value for name, value in line.items() if name not in FIELDS)
    measured = all(value is None or isinstance(value, int | float) for value in values)
    return line if known and measured and {"stage", "done"} <= line.keys() else None


def lost_lines(path: Path) -> int:
    """Return the number of invalid lines in a metrics file, without a truncated last line (of a killed run)."""
    *whole, _ = path.read_bytes().split(b"\n") if path.exists() else [b""]
    return sum(bool(text.strip()) and parse_line(text) is None for text in whole)


def _lines(path: Path) -> Iterator[MetricsLine]:
    """Yield the valid lines of a metrics file."""
    if not path.exists():
        return
    for text in path.read_bytes().split(b"\n"):
        if (line := parse_line(text)) is not None:
            yield line


def read_metrics(path: Path) -> list[MetricsLine]:
    """Return the current lines of `metrics.jsonl`, oldest first; empty if there is no file.

    If a stage resumed or restarted at a step, its earlier lines from that step on are dropped.
    """
    kept: dict[str, list[tuple[int, MetricsLine]]] = defaultdict(list)
    for position, line in enumerate(_lines(path)):
        earlier = kept[line["stage"]]
        while earlier and earlier[-1][1]["done"] >= line["done"]:
            earlier.pop()
        earlier.append((position, line))
    return [line for _, line in sorted((entry for lines in kept.values() for entry in lines), key=itemgetter(0))]
