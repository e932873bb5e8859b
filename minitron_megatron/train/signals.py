"""The scheduler's word that the machine is wanted back."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..parallel import Topology, sum_over_world

__all__ = ["any_rank_signalled", "local_signals"]

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Slurm sends the first on preemption, and the second ahead of the time limit where it is asked to."""


@contextmanager
def local_signals() -> Iterator[Sequence[int]]:
    """Yields the signals that this rank has heard since; whoever heard them before is told of it at the end.

    Off the main thread, where Python allows no handlers, nothing is heard.
    """
    heard: list[int] = []  # a lock, as in threading.Event, would be waited for by a handler within a handler

    def hear(number: int, *_: Any) -> None:
        heard.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield heard
        return
    before = {number: signal.signal(number, hear) for number in SIGNALS}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
            if number in heard and callable(handler):
                handler(number, None)


@contextmanager
def any_rank_signalled(topology: Topology) -> Iterator[Callable[[], bool]]:
    """Yields whether any rank has heard a signal since; asking is collective over the world."""
    with local_signals() as heard:
        yield lambda: bool(sum_over_world(torch.tensor(len(heard), device=topology.device)))
