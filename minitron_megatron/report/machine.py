"""How the first rank's machine fares meanwhile: memory and load, beside the measurements of the work."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil
import torch

from ..events import Event, Listener

__all__ = ["MACHINE", "Machine"]

MACHINE = "machine"
"""The label of these measurements: no stage."""
EVERY_SECONDS = 30.0


class Machine:
    """A listener that tells `listener` of the machine, at an event of the work, every so many seconds at most.

    In bytes: `process_bytes`, `host_bytes` (in use, of all processes), on a GPU `gpu_bytes`. Shares of 1: `host_load`
    of all cores since the last time, and `gpu_load` where NVIDIA's pynvml is installed. `done`: seconds since 1970.
    """

    def __init__(
        self, listener: Listener, *, every: float = EVERY_SECONDS, clock: Callable[[], float] = time.time
    ) -> None:
        self._listener, self._every, self._clock, self._told = listener, every, clock, -every
        psutil.cpu_percent()  # what it says is since its last call

    def __call__(self, event: Event) -> None:
        now = self._clock()
        if event.values and now - self._told >= self._every:
            self._told = now
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
