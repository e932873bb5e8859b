"""Keep `status.json` up to date while a command runs the stages."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

from ..errors import FileError, MinitronError, Preempted, first_line
from ..files import write_json
from ..records import RunStatus, StageState
from ..run_folder import RunFolder

__all__ = ["StatusFile"]


class StatusFile:
    """Context that writes the state of each stage at each change, on the rank that `writes`."""

    def __init__(self, folder: RunFolder, stages: Sequence[str], *, writes: bool) -> None:
        self._path, self._writes = folder.status, writes
        self._stages: dict[str, StageState] = dict.fromkeys(stages, "waiting")

    def __enter__(self) -> Self:
        self._write()
        return self

    def set(self, stage: str, state: StageState) -> None:
        """Set a stage's state. Raises FileError where the file cannot be written."""
        self._stages[stage] = state
        self._write()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._write(ended=True)
            return
        self._stages = {stage: "stopped" if state == "running" else state for stage, state in self._stages.items()}
        with suppress(FileError):  # the error itself is reported
            self._write(ended=True, why=_reason(error))

    def _write(self, *, ended: bool = False, why: str = "") -> None:
        if self._writes:
            state: RunStatus = {"stages": self._stages, "since": time.time(), "ended": ended, "why": why}  # type: ignore[typeddict-item]
            write_json(self._path, state | {"host": socket.gethostname(), "process": os.getpid()})


def _reason(error: BaseException) -> str:
    if isinstance(error, Preempted):
        return "the scheduler sent a signal"
    if isinstance(error, KeyboardInterrupt):
        return "it was interrupted"
    return first_line(error) if isinstance(error, MinitronError) else f"{type(error).__name__}: {first_line(error)}"
