"""Preemption signals of the cluster's scheduler."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from ..parallel import Topology, sum_over_world

__all__ = ["any_rank_signalled", "local_signals"]

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Slurm sends SIGTERM on preemption, and SIGUSR1 ahead of the time limit if the job asks for it (`--signal`)."""


@contextmanager
def local_signals() -> Iterator[Sequence[int]]:
    """Yield the list of signals that this rank has received since; on exit, pass them on to the previous handlers.

    Outside the main thread, where Python allows no signal handlers, the list stays empty.
    """
    received: list[int] = []  # not a threading.Event: its lock could deadlock when one handler interrupts another

    def record(number: int, *_: object) -> None:
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = {number: signal.signal(number, record) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
            if number in received and callable(handler):
                handler(number, None)


@contextmanager
def any_rank_signalled(topology: Topology) -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether any rank has received a signal since; calling it is collective (world)."""
    with local_signals() as received:
        yield lambda: bool(sum_over_world(torch.tensor(len(received), device=topology.device)))
