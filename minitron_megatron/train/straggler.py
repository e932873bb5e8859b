"""Detection of stragglers.

Ranks wait for each other in a step, so that a step takes equally long on all of them. A straggler shows only in the
time that each rank spends on its own work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median_low

import torch

from ..parallel import Topology, gather_objects

__all__ = ["StragglerMonitor"]

LOOK_EVERY = 50
"""Steps between two comparisons."""
SLOW = 1.5
"""A rank is a straggler if it takes this many times the median in LOOKS comparisons in a row."""
LOOKS = 3
REPEATS = 8


class StragglerMonitor:
    """Compares the time that ranks spend on their own: loading a step's batches, and a few equal matrix products."""

    def __init__(
        self, topology: Topology, *, every: int = LOOK_EVERY, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._topology, self._every, self._clock = topology, every, clock
        self._alone, self._steps = 0.0, 0
        self._slowest, self._in_a_row = -1, 0

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Time the part of a step in which no rank waits for another."""
        began = self._clock()
        yield
        self._alone, self._steps = self._alone + self._clock() - began, self._steps + 1

    def look(self, step: int) -> dict[str, float]:
        """Return the slowest rank, its seconds and the median's, every so many steps; else nothing. Collective over
        the world."""
        if step % self._every or self._topology.world == 1 or not self._steps:
            return {}
        times = gather_objects(self._alone / self._steps + self._probe())
        self._alone, self._steps = 0.0, 0
        slowest, typical = max(range(len(times)), key=times.__getitem__), median_low(times)
        again = slowest == self._slowest and self._in_a_row
        self._in_a_row = 0 if times[slowest] < SLOW * typical else again + 1
        self._slowest = slowest
        return {"slowest_rank": slowest, "slowest_seconds": times[slowest], "median_seconds": typical}

    @property
    def straggler(self) -> int | None:
        """Rank to report as a straggler now, once per series of slow comparisons; None: no rank."""
        return self._slowest if self._in_a_row == LOOKS else None

    def _probe(self) -> float:
        """Return the seconds of a small computation that is equal on every rank and waits for none."""
        on_gpu = self._topology.device.type == "cuda"
        size, dtype = (4096, torch.bfloat16) if on_gpu else (256, torch.float32)
        ones = torch.ones(size, size, dtype=dtype, device=self._topology.device)
        torch.cuda.synchronize()
        began = self._clock()
        for _ in range(REPEATS):
            ones @ ones
        torch.cuda.synchronize()
        return self._clock() - began
