"""A run that no longer moves ends by itself, and says where every rank stood."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from ..events import Event
from ..run_folder import RunFolder

__all__ = ["STUCK", "Watchdog"]

STUCK = 76
"""The exit code of a rank that waited in vain: begin again, what is saved is good."""

TOUCH_SECONDS = 1.0


class Watchdog:
    """A listener that marks each event in `folder/heartbeat`, which all ranks share, and a thread that reads it.

    Where no rank made a mark for `seconds`, each that still can writes the stacks of its threads to
    `folder/stacks/rank-N.txt` and ends with STUCK, whatever it waits for. One rank that works and tells of it keeps all
    alive: the others may wait for it as long as it takes.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        seconds: float,
        *,
        end: Callable[[int], None] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._rank, self._seconds, self._end, self._clock = RunFolder(folder), rank, seconds, end, clock
        self._touched = -TOUCH_SECONDS
        self._seen, self._since = self._mark(), clock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __call__(self, event: Event) -> None:
        if self._clock() - self._touched >= TOUCH_SECONDS and self._run.path.is_dir():
            self._touched = self._clock()
            with suppress(OSError):  # of a full disk, or one that is away for a moment: the next event tries again
                self._run.heartbeat.touch()

    def __enter__(self) -> Self:
        self._since = self._clock()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(min(self._seconds / 10, 5.0)):
            if self.looks():
                return

    def looks(self) -> bool:
        """Whether there was no new mark for too long, by the clock of this machine: those of others may differ. This
        process has ended then."""
        if (mark := self._mark()) != self._seen:
            self._seen, self._since = mark, self._clock()
        elif self._clock() - self._since > self._seconds:
            self._give_up()
            return True
        return False

    def _mark(self) -> int:
        try:
            return self._run.heartbeat.stat().st_mtime_ns
        except OSError:
            return 0

    def _give_up(self) -> None:
        path = self._run.stacks / f"rank-{self._rank}.txt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            pass
        where = f"Its stacks are in {path}."
        if not path.exists() or not path.stat().st_size:  # a full disk
            where = "Its stacks stand above."
            faulthandler.dump_traceback(2, all_threads=True)
        print(
            f"no rank made progress for {self._seconds:g} s (hang_seconds): rank {self._rank} gives up. {where} "
            "Run the same command again to go on.",
            file=sys.stderr,
            flush=True,
        )
        self._end(STUCK)
