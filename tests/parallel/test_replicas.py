"""Replicas leave the world, work independently, and rejoin."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from minitron_megatron.errors import RecipeError, TopologyError
from minitron_megatron.parallel import Topology, all_reduce, gather_objects, independent_replicas, sum_over_world
from minitron_megatron.testing import Pool


def _places(topology: Topology) -> dict[str, Any]:
    """Return the layouts that a rank sees before, inside and after the block."""

    def seen(at: Topology) -> tuple[Any, ...]:
        sums = [float(all_reduce(torch.tensor(float(topology_rank)), group)) for group in (at.tp_group, at.dp_group)]
        return at.world, at.rank, at.tp_rank, at.pp_rank, at.dp_rank, sums, sorted(gather_objects(topology_rank))

    topology_rank, replica = topology.rank, topology.dp_rank
    found: dict[str, Any] = {"before": seen(topology)}
    for turn in ("first", "second"):
        with independent_replicas(topology) as own:
            time.sleep(0.3 * replica)
            found[turn] = (seen(own), float(sum_over_world(torch.tensor(float(replica)))))
    return found | {"after": seen(topology)}


@pytest.mark.parametrize("layout", [{"tp": 2}, {"pp": 2}, {}], ids=str)
def test_each_replica_is_a_world_and_then_all_are_one(pool: Pool, layout: dict[str, int]) -> None:
    results = pool.run(_places, dp=2, **layout)
    tp, within = layout.get("tp", 1), len(results) // 2
    for rank, found in enumerate(results):
        assert found["before"] == found["after"]
        replica = rank // tp % 2
        members = [each for each in range(len(results)) if each // tp % 2 == replica]
        for turn in ("first", "second"):
            (world, own_rank, tp_rank, pp_rank, dp_rank, _, ranks), total = found[turn]
            assert (world, ranks, dp_rank) == (within, members, 0)
            assert own_rank == tp_rank + tp * pp_rank == members.index(rank)
            assert total == replica * within


def _fails(topology: Topology) -> None:
    replica = topology.dp_rank
    with independent_replicas(topology):
        if replica:
            raise RecipeError("one replica's fault")


def test_the_fault_of_one_replica_is_everybodys(pool: Pool) -> None:
    with pytest.raises(RecipeError, match="one replica's fault"):
        pool.run(_fails, dp=2)
    assert pool.run(_places, dp=2)


def _experts(topology: Topology) -> None:
    with independent_replicas(topology):
        pass


def test_replicas_that_share_experts_cannot_be_independent(pool: Pool) -> None:
    with pytest.raises(TopologyError, match="ep=2"):
        pool.run(_experts, dp=2, ep=2)


def test_ranks_that_have_parted_before_meet_those_that_have_not(pool: Pool) -> None:
    pool.run(_places, dp=2)
    assert len(pool.run(_places, tp=2, dp=2)) == 4
