"""Process groups on a CPU: one for each set of ranks, and none that outlives its world."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from minitron_megatron.parallel import Topology, mcore_patches
from minitron_megatron.testing import Pool


def sums(topology: Topology) -> dict[str, tuple[list[int], int]]:
    """Return (ranks, sum of their numbers by an all-reduce) of each group."""
    found = {}
    for name in ("tp_group", "pp_group", "dp_group"):
        group, number = getattr(topology, name), torch.tensor(topology.rank)
        dist.all_reduce(number, group=group)
        found[name] = (dist.get_process_group_ranks(group), int(number))
    return found


def shared(topology: Topology) -> tuple[int, int]:
    """Return how many groups mcore holds here, and how many sets of ranks they have."""
    from megatron.core import parallel_state

    groups = [value for value in vars(parallel_state).values() if isinstance(value, dist.ProcessGroup)]
    return len({id(group) for group in groups}), len({tuple(dist.get_process_group_ranks(group)) for group in groups})


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {"tp": 2, "pp": 2}, {"tp": 2, "dp": 2}], ids=str)
def test_a_set_of_ranks_has_one_group_that_serves_every_purpose(pool: Pool, layout: dict[str, int]) -> None:
    for groups, sets in pool.run(shared, **layout):
        assert groups == sets > 1
    for found in pool.run(sums, **layout):
        assert all(total == sum(ranks) for ranks, total in found.values())


def renewed(topology: Topology) -> tuple[bool, bool]:
    """Return whether a group is created again: in the same world, and after the world has changed."""
    from megatron.core import parallel_state

    first = parallel_state.create_group([0])
    same = parallel_state.create_group([0]) is not first
    mcore_patches._groups[()] = "the world of another start"
    return same, parallel_state.create_group([0]) is not first


def test_a_world_that_ended_without_its_layout_leaves_no_group(pool: Pool) -> None:
    assert pool.run(renewed) == [(False, True)]


def nothing(topology: Topology) -> None:
    """End at once."""


def test_a_rank_that_ends_at_once_lets_the_others_start(pool: Pool) -> None:
    for _ in range(20):
        pool.run(nothing, tp=2, pp=2)
