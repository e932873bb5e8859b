"""A rank whose own work is slow is named, and reported as a straggler if it stays slow."""

from __future__ import annotations

from typing import Any

from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool
from minitron_megatron.train.straggler import LOOKS, StragglerMonitor


def looks(topology: Topology, slow: list[int]) -> list[tuple[dict[str, float], int | None]]:
    """Compare every two steps; a step takes the rank in `slow` 3 s and the others 1 s, the probe takes no time."""
    now, seen = 0.0, []
    monitor = StragglerMonitor(topology, every=2, clock=lambda: now)
    for step in range(1, 2 * len(slow) + 1):
        with monitor.alone():
            now += 3.0 if topology.rank == slow[(step - 1) // 2] else 1.0
        if found := monitor.look(step):
            seen.append((found, monitor.straggler))
    return seen


def test_all_ranks_name_the_slowest_and_the_one_that_stays_so_is_told_once(pool: Pool) -> None:
    slow = [1, 0, *[1] * (LOOKS + 1)]
    expected: list[Any] = [
        ({"slowest_rank": rank, "slowest_seconds": 3.0, "median_seconds": 1.0}, 1 if at == LOOKS + 1 else None)
        for at, rank in enumerate(slow)
    ]
    assert pool.run(looks, slow, dp=2) == [expected, expected]


def test_ranks_alike_are_no_stragglers_and_one_has_none(pool: Pool) -> None:
    assert all(straggler is None for _, straggler in pool.run(looks, [9] * (LOOKS + 1), dp=2)[0])
    assert pool.run(looks, [0] * LOOKS) == [[]]
