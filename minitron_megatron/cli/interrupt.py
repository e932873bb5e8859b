"""Ctrl-C as a KeyboardInterrupt that cannot get lost.

A KeyboardInterrupt can get lost: Python drops it in a finalizer, a library's bare `except` swallows it (perhaps in the
middle of its import), and it is not raised while C code waits for another rank. So the next event of the run raises it
again, and after a timeout the process ends in any case.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

from ..events import Event

__all__ = ["Interrupted", "ignore", "interrupted", "listen", "raise_if_interrupted"]

SAME_SECONDS = 1.0
"""SIGINTs within this time count as one Ctrl-C: the terminal signals every process, and a launcher signals them
again."""


class Interrupted(Exception):
    """Ctrl-C, as an exception that typer does not turn into its own message."""


_received: list[int] = []
"""The first SIGINT. A list, because the lock of a threading.Event could deadlock in a nested signal handler."""


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


def ignore() -> None:
    """Ignore SIGINT from now on: the work is done, and Python's shutdown takes a second."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def interrupted() -> bool:
    """Whether Ctrl-C was pressed."""
    return bool(_received)


def raise_if_interrupted(event: Event) -> None:
    """Listener that raises a lost KeyboardInterrupt again; for the main thread."""
    if interrupted():
        raise KeyboardInterrupt


def _drain(pipe: int) -> None:
    while select.select([pipe], [], [], 0)[0]:
        os.read(pipe, 1)
