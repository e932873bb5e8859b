"""Follow a running job from another terminal: pass the lines of its metrics file to a listener as it grows."""

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
    """Pass the run's events so far to `listener`, and then each new one, polling every `every` seconds while `goes_on`.

    Raises CheckpointError if the folder is not a run folder.
    """
    path, read = RunFolder.existing(run).metrics, 0
    for line in read_metrics(path):
        _send(listener, line)
    read = _whole_bytes(path)
    while goes_on():
        time.sleep(every)
        if not path.exists():
            continue
        with path.open("rb") as file:
            file.seek(min(read, _whole_bytes(path)))
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        read = min(read, _whole_bytes(path)) + len(whole)
        for text in whole.splitlines():
            if (new_line := parse_line(text)) is not None:
                _send(listener, new_line)


def _whole_bytes(path: Path) -> int:
    """Return the file's length up to the end of its last whole line."""
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def _send(listener: Listener, line: dict[str, float | str | None]) -> None:
    if line["stage"] == MACHINE or "total" not in line:
        return
    values = {name: value for name, value in line.items() if name not in NOT_VALUES and isinstance(value, int | float)}
    listener(Event(str(line["stage"]), int(line["done"]), int(line["total"]), str(line.get("unit", "steps")), values))  # type: ignore[arg-type]
