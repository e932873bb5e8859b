"""The scheduler's word that the machine is wanted back: heard by any rank, obeyed by all after the step at work."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..parallel import Topology, sum_over_world

__all__ = ["listening"]

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Slurm sends the first on preemption, and the second ahead of the time limit where it is asked to."""


@contextmanager
def listening(topology: Topology) -> Iterator[Callable[[], bool]]:
    """Yields whether any rank has heard a signal since; asking is collective over the world.

    Off the main thread, where Python allows no handlers, nothing is heard.
    """
    heard = threading.Event()

    def hear(*_: Any) -> None:
        heard.set()

    def anyone() -> bool:
        return bool(sum_over_world(torch.tensor(int(heard.is_set()), device=topology.device)))

    if threading.current_thread() is not threading.main_thread():
        yield anyone
        return
    before = {number: signal.signal(number, hear) for number in SIGNALS}
    try:
        yield anyone
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
