"""Ctrl-C: a KeyboardInterrupt, as ever, but one that cannot be lost.

Python drops a KeyboardInterrupt that falls into a finalizer, a library's bare `except` eats it, half imported as the
library may be, and none is raised while C code waits for another rank. So the next event of the work raises it again,
and after a while the process ends whatever it does.
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
"""A terminal tells every process of a Ctrl-C, and whoever started them tells them again."""


class Interrupted(Exception):
    """Ctrl-C; typer would say nothing of how to go on."""


_heard: list[int] = []
"""The first signal. A lock, as in threading.Event, would be waited for by a handler within a handler."""


def listen(seconds: float, end: Callable[[], None]) -> None:
    """Hears SIGINT until the process ends; a thread calls `end` so long after the first, or at once at a second."""
    home = os.getpid()
    told, tell = os.pipe()
    os.set_blocking(tell, False)

    def hear(number: int, frame: FrameType | None) -> None:
        if os.getpid() != home:  # a process that it forked
            raise KeyboardInterrupt
        if not _heard:
            _heard.append(number)
            raise KeyboardInterrupt

    def watch() -> None:
        while signal.SIGINT not in os.read(told, 1):
            pass
        time.sleep(min(SAME_SECONDS, seconds))
        _drain(told)
        last = time.monotonic() + seconds - SAME_SECONDS
        while (left := last - time.monotonic()) > 0 and select.select([told], [], [], left)[0]:
            if signal.SIGINT in os.read(told, 1):
                break
        end()

    signal.signal(signal.SIGINT, hear)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)  # written by C code, whatever Python does
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
    threading.Thread(target=watch, name="interrupt", daemon=True).start()


def ignore() -> None:
    """Hears no SIGINT from now on: the work is done, and Python's own end, which takes a second, would drop it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def interrupted() -> bool:
    """Whether there was a Ctrl-C."""
    return bool(_heard)


def raise_if_interrupted(event: Event) -> None:
    """The listener that raises a lost KeyboardInterrupt again; for the main thread."""
    if interrupted():
        raise KeyboardInterrupt


def _drain(pipe: int) -> None:
    while select.select([pipe], [], [], 0)[0]:
        os.read(pipe, 1)
