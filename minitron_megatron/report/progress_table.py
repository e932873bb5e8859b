"""State of a run as a table: stages, steps, rates and the time left, all by the times in the run's own records."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from .. import numbers
from ..records import RunStatus, read_status
from ..run_folder import RunFolder
from .listeners import MetricsLine, read_metrics
from .machine import MACHINE
from .made import made, read_record
from .tables import at_dashes

__all__ = ["RunState", "run_state"]

RECENT = 20
"""Number of lines whose times give the current rate."""
TITLES = ("stage", "state", "progress", "rate", "time")
Row = tuple[str, str, str, str, str]


class RunState(NamedTuple):
    """State of a run: a row per stage with the columns `TITLES`, a closing sentence, and whether the command ended."""

    rows: list[Row]
    sentence: str
    over: bool

    def shown(self, run: Path) -> Group:
        """Return the state for the terminal: the run's folder, a table and the sentence."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in TITLES:
            table.add_column(column, no_wrap=column != "progress", overflow="fold")
        for row in self.rows:
            stage, state, progress, *rest = row
            words = Text(" ").join(map(at_dashes, progress.split(" ")))
            table.add_row(stage, state, words, *rest)
        return Group(Text(f"run {run}"), table, Text(self.sentence))


def run_state(run: Path, now: float) -> RunState:
    """Return the state of a run at the time `now`, in seconds since 1970.

    Raises CheckpointError if the folder is not a run folder, FileError where a record of it is damaged.
    """
    folder = RunFolder.existing(run)
    status = read_status(folder.status)
    if status is None:  # a run of an older version
        return RunState([_row(folder, path.stem, "done", [], 0.0) for path in folder.record_paths()], "", over=True)
    every = [line for line in read_metrics(folder.metrics) if _is_progress(line)]
    lines = [line for line in every if _time(line) >= status["since"]]
    gone = not status["ended"] and _is_dead(status)
    states = {name: "stopped" if gone and state == "running" else state for name, state in status["stages"].items()}
    stopped = {stage: [line for line in every if line["stage"] == stage] for stage in states}
    rows = [
        _row(folder, stage, state, (state == "stopped" and stopped[stage]) or lines, now - status["since"])
        for stage, state in states.items()
    ]
    if status["ended"] and lines:  # tasks of a search write no status
        rows.append(_working(str(lines[-1]["stage"]), "running", lines, 0.0))
        return RunState(rows, _last_progress(folder, now), over=False)
    return RunState(rows, _sentence(folder, status, now, gone=gone), status["ended"] or gone)


def _is_progress(line: MetricsLine) -> bool:
    return line["stage"] != MACHINE and bool(line.get("total"))


def _time(line: MetricsLine) -> float:
    """Return a line's time in seconds since 1970; 0 if it has none."""
    with suppress(KeyError, ValueError):
        return datetime.fromisoformat(line["time"]).timestamp()
    return 0.0


def _row(folder: RunFolder, stage: str, state: str, lines: Sequence[MetricsLine], elapsed: float) -> Row:
    """Return a stage's row. lines: those since the stage at work began, `elapsed` seconds ago."""
    if state in ("running", "stopped"):
        return _working(stage, state, lines, elapsed)
    record = read_record(folder, stage) if state in ("done", "ran") else None
    if record is None:
        return stage, state, "", "", ""
    return stage, "done", made(stage, record["result"]), "", numbers.duration(record["seconds"])


def _working(stage: str, state: str, lines: Sequence[MetricsLine], elapsed: float) -> Row:
    """Return the row of a stage that is, or was, at work, by the last lines of one label."""
    latest: list[MetricsLine] = []
    for line in reversed(lines):
        if len(latest) == RECENT or (
            latest and (line["stage"], True) != (latest[0]["stage"], line["done"] < latest[0]["done"])
        ):
            break
        latest.insert(0, line)
    if not latest:
        return stage, state, "", "", f"{numbers.duration(elapsed)} so far" if state == "running" else ""
    last, rate = latest[-1], _rate(latest, "done")
    unit = str(last.get("unit", "steps"))
    amount = f"{_amount(last['done'], unit)} of {_amount(last['total'], unit)}"
    progress = amount if unit == "bytes" else f"{amount} {unit}"
    label = "" if last["stage"] == stage else f"{last['stage']}: "
    loss = "" if last.get("loss") is None else f", loss {numbers.loss(last['loss'])}"
    left = f"{numbers.duration((last['total'] - last['done']) / rate)} left" if rate and state == "running" else ""
    return stage, state, f"{label}{progress}{loss}", _speed(latest, unit), left


def _amount(number: float, unit: str) -> str:
    return numbers.size(number) if unit == "bytes" else numbers.count(number)


def _speed(lines: Sequence[MetricsLine], unit: str) -> str:
    """Return the speed over some lines of one label, in tokens if they count them."""
    if tokens := _rate(lines, "tokens"):
        return f"{numbers.count(tokens)} tokens/s"
    rate = _rate(lines, "done")
    if not rate:
        return ""
    return f"{numbers.size(rate)}/s" if unit == "bytes" else f"{rate:,.3g} {unit}/s"


def _rate(lines: Sequence[MetricsLine], key: str) -> float:
    """Return the growth of a count per second, by the lines' own times; 0 if it cannot be told."""
    first, last = lines[0], lines[-1]
    seconds = _time(last) - _time(first)
    grown = (last.get(key) or 0) - (first.get(key) or 0)
    return grown / seconds if seconds > 0 and grown > 0 and _time(first) else 0.0


def _sentence(folder: RunFolder, status: RunStatus, now: float, *, gone: bool) -> str:
    """Return how the last command ended, or when its last progress was. gone: its process is known to have ended."""
    at = next((f" in {stage}" for stage, state in status["stages"].items() if state in ("running", "stopped")), "")
    if status["why"]:
        return f"Stopped{at}: {status['why']}. Run the same command again to resume."
    if status["ended"]:
        return "Done."
    if gone:
        return f"Stopped{at}: its process is gone (killed?). Run the same command again to resume."
    return _last_progress(folder, now)


def _last_progress(folder: RunFolder, now: float) -> str:
    try:
        return f"Last progress {numbers.duration(max(0.0, now - folder.heartbeat.stat().st_mtime))} ago."
    except OSError:
        return "No progress yet."


def _is_dead(status: RunStatus) -> bool:
    """Whether the command's process ran on this machine and is gone; of another machine nothing is known."""
    if status["host"] != socket.gethostname() or status["process"] <= 0:
        return False
    try:
        os.kill(status["process"], 0)
    except PermissionError:
        return False
    except (ProcessLookupError, OverflowError):
        return True
    return False
