"""Memory and load of rank 0's machine, logged together with the run's measurements."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil
import torch

from ..events import Event, Listener

__all__ = ["MACHINE", "Machine"]

MACHINE = "machine"
"""Event label of these measurements; it is not a stage."""
EVERY_SECONDS = 30.0


class Machine:
    """Listener that sends `listener` an event on the machine, when a stage sends one, at most once per `every` seconds.

    In bytes: `process_bytes`, `host_bytes` (in use, by all processes), on a GPU `gpu_bytes`. From 0 to 1: `host_load`,
    over all cores since the last event, and `gpu_load`, if NVIDIA's pynvml is installed. `done`: seconds since 1970.
    """

    def __init__(
        self, listener: Listener, *, every: float = EVERY_SECONDS, clock: Callable[[], float] = time.time
    ) -> None:
        self._listener, self._every, self._clock, self._last = listener, every, clock, -every
        psutil.cpu_percent()  # it measures since its last call

    def __call__(self, event: Event) -> None:
        now = self._clock()
        if event.values and now - self._last >= self._every:
            self._last = now
            self._listener(Event(MACHINE, int(now), int(now), "seconds", {**_host(), **_gpu()}))


def _host() -> dict[str, float]:
    memory = psutil.virtual_memory()
    return {
        "process_bytes": psutil.Process().memory_info().rss,
        "host_bytes": memory.total - memory.available,
        "host_load": psutil.cpu_percent() / 100,
    }


def _gpu() -> dict[str, float]:
    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    try:
        return {"gpu_bytes": total - free, "gpu_load": torch.cuda.utilization() / 100}
    except (ImportError, RuntimeError):
        return {"gpu_bytes": total - free}
