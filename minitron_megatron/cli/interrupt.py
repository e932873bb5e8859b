"""Ctrl-C and the scheduler's signal as exceptions that cannot get lost.

An exception of a signal handler can get lost: Python drops it in a finalizer, a library's bare `except` swallows it
(perhaps in the middle of its import, which then fails later), and it is not raised while C code waits for another rank.
So the next event of the run raises it again, and after Ctrl-C the process ends in any case after a timeout.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from ..errors import Preempted
from ..events import Event

__all__ = ["Interrupted", "ignore", "interrupted", "listen", "listen_to_scheduler", "preempted", "raise_if_interrupted"]

SAME_SECONDS = 1.0
"""SIGINTs within this time count as one Ctrl-C: the terminal signals every process, and a launcher signals them
again."""


class Interrupted(Exception):
    """Ctrl-C, as an exception that typer does not turn into its own message."""


_received: list[int] = []
"""The first SIGINT. A list, because the lock of a threading.Event could deadlock in a nested signal handler."""

_preempted: list[int] = []
"""The scheduler's signals, but those of a stage, which handles its own."""


def listen(seconds: float, end: Callable[[], None]) -> None:
    """Handle SIGINT until the process ends. A thread calls `end` after `seconds`, or at once on a second Ctrl-C."""
    main_process = os.getpid()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def handle(number: int, frame: FrameType | None) -> None:
        if os.getpid() != main_process:  # a forked process
            raise KeyboardInterrupt
        if not _received:
            _received.append(number)
            raise KeyboardInterrupt

    def watch() -> None:
        while signal.SIGINT not in os.read(reader, 1):
            pass
        time.sleep(min(SAME_SECONDS, seconds))
        _drain(reader)
        last = time.monotonic() + seconds - SAME_SECONDS
        while (left := last - time.monotonic()) > 0 and select.select([reader], [], [], left)[0]:
            if signal.SIGINT in os.read(reader, 1):
                break
        end()

    signal.signal(signal.SIGINT, handle)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)  # C code writes to it, whatever Python is doing
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=watch, name="interrupt", daemon=True).start()


def listen_to_scheduler() -> None:
    """Raise Preempted at the scheduler's signals where no stage handles them."""

    def handle(number: int, frame: FrameType | None) -> None:
        _preempted.append(number)
        raise Preempted

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, handle)
    sys.unraisablehook = _print_unless_lost


def _print_unless_lost(found: sys.UnraisableHookArgs) -> None:
    """Print an exception that Python drops; one of a signal is raised again by the next event."""
    if not issubclass(found.exc_type, (KeyboardInterrupt, Preempted)):
        sys.__unraisablehook__(found)


def ignore() -> None:
    """Ignore SIGINT from now on: the work is done, and Python's shutdown takes a second."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def interrupted() -> bool:
    """Whether Ctrl-C was pressed."""
    return bool(_received)


def preempted() -> bool:
    """Whether the scheduler's signal came while no stage handled it."""
    return bool(_preempted)


def raise_if_interrupted(event: Event) -> None:
    """Listener that raises a lost KeyboardInterrupt or Preempted again; for the main thread."""
    if interrupted():
        raise KeyboardInterrupt
    if preempted():
        raise Preempted


def _drain(pipe: int) -> None:
    while select.select([pipe], [], [], 0)[0]:
        os.read(pipe, 1)
