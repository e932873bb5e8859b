"""Watchdog that ends a hanging run and writes the stacks of every rank."""

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
"""Exit code of a rank of a hanging run. Saved results are intact, so the job can be started again."""

TOUCH_SECONDS = 1.0


class Watchdog:
    """Listener that touches the shared file `folder/heartbeat` at each event, and a thread that watches this file.

    If no rank touches it for `seconds`, each rank writes the stacks of its threads to `folder/stacks/rank-N.txt` and
    exits with STUCK, whatever it is waiting for. One rank that makes progress keeps all ranks alive: the others may
    wait for it without limit.
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
        self._heartbeat, self._since = self._read_heartbeat(), clock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __call__(self, event: Event) -> None:
        if self._clock() - self._touched >= TOUCH_SECONDS and self._run.path.is_dir():
            self._touched = self._clock()
            with suppress(OSError):  # a full disk, or one that is briefly unavailable: the next event tries again
                self._run.heartbeat.touch()

    def __enter__(self) -> Self:
        self._since = self._clock()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(min(self._seconds / 10, 5.0)):
            if self.check():
                return

    def check(self) -> bool:
        """End the process and return True if the heartbeat has not changed for too long, by this machine's clock (the
        clocks of other machines may differ)."""
        if (heartbeat := self._read_heartbeat()) != self._heartbeat:
            self._heartbeat, self._since = heartbeat, self._clock()
        elif self._clock() - self._since > self._seconds:
            self._give_up()
            return True
        return False

    def _read_heartbeat(self) -> int:
        """Return the heartbeat's modification time in nanoseconds; 0 if there is none."""
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
            where = "Its stacks are printed above."
            faulthandler.dump_traceback(2, all_threads=True)
        print(
            f"no rank made progress for {self._seconds:g} s (hang_seconds): rank {self._rank} exits. {where} "
            "Run the same command again to resume.",
            file=sys.stderr,
            flush=True,
        )
        self._end(STUCK)
