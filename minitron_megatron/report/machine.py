"""Memory and load of rank 0's machine, logged together with the run's measurements."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil
import torch

from ..errors import Preempted
from ..events import Event, Listener

__all__ = ["MACHINE", "Machine"]

MACHINE = "machine"
"""Event label of these measurements; it is not a stage."""
EVERY_SECONDS = 30.0


class Machine:
    """Listener that sends `listener` an event on the machine, when a stage sends one, at most once per `every` seconds.

    In bytes: `process_bytes`, `host_bytes` (in use, by all processes), on a GPU `gpu_bytes`. From 0 to 1: `host_load`,
    over all cores since the last event, and on a GPU `gpu_load`. What this machine does not tell is left out: parts of
    a GPU (MIG, vGPU) have no load, and no GPU's is known without NVIDIA's pynvml. `done`: seconds since 1970.
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
            values = {name: value for name, measure in _MEASURES.items() if (value := _measured(measure)) is not None}
            self._listener(Event(MACHINE, int(now), int(now), "seconds", values))


def _measured(measure: Callable[[], float | None]) -> float | None:
    """Return a measurement; None where it cannot be taken. Each library has its own errors, and none may end a run."""
    try:
        return measure()
    except Preempted:  # a signal, not the library
        raise
    except Exception:
        return None


def _host_bytes() -> float:
    memory = psutil.virtual_memory()
    return memory.total - memory.available


def _gpu_bytes() -> float | None:
    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return total - free


def _gpu_load() -> float | None:
    return torch.cuda.utilization() / 100 if torch.cuda.is_available() else None


_MEASURES: dict[str, Callable[[], float | None]] = {
    "process_bytes": lambda: psutil.Process().memory_info().rss,
    "host_bytes": _host_bytes,
    "host_load": lambda: psutil.cpu_percent() / 100,
    "gpu_bytes": _gpu_bytes,
    "gpu_load": _gpu_load,
}
