"""A run seen from another terminal: its metrics file, told to a listener line by line as it grows."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from ..events import Event, Listener
from ..run_folder import RunFolder
from .listeners import parse_line, read_metrics
from .machine import MACHINE

__all__ = ["watch"]

NOT_VALUES = ("time", "stage", "done", "total", "unit")


def watch(run: Path, listener: Listener, *, goes_on: Callable[[], bool] = lambda: True, every: float = 1.0) -> None:
    """Tells `listener` the run's events so far and then each new one, looking every so many seconds while `goes_on`.

    Raises CheckpointError where the folder is no run.
    """
    path, read = RunFolder.existing(run).metrics, 0
    for line in read_metrics(path):
        _tell(listener, line)
    read = _whole_bytes(path)
    while goes_on():
        time.sleep(every)
        if not path.exists():
            continue
        with path.open("rb") as file:
            file.seek(min(read, _whole_bytes(path)))
            fresh = file.read()
        whole = fresh[: fresh.rfind(b"\n") + 1]
        read = min(read, _whole_bytes(path)) + len(whole)
        for text in whole.splitlines():
            if (fresh_line := parse_line(text)) is not None:
                _tell(listener, fresh_line)


def _whole_bytes(path: Path) -> int:
    """Up to the end of the last whole line."""
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def _tell(listener: Listener, line: dict[str, float | str | None]) -> None:
    if line["stage"] == MACHINE or "total" not in line:
        return
    values = {name: value for name, value in line.items() if name not in NOT_VALUES and isinstance(value, int | float)}
    listener(Event(str(line["stage"]), int(line["done"]), int(line["total"]), str(line.get("unit", "steps")), values))  # type: ignore[arg-type]
