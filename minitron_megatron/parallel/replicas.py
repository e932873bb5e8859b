"""Data-parallel replicas that work independently for a while, each as a world of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import torch.distributed as dist

from ..errors import MinitronError, TopologyError
from .collectives import broadcast_object, fail_together
from .limits import WAIT
from .topology import Topology, claim_device

__all__ = ["check_independent_replicas", "independent_replicas"]

WAIT_SECONDS = 0.2


def check_independent_replicas(topology: Topology) -> None:
    """Raise TopologyError where data-parallel replicas share experts or sequences."""
    if topology.ep > 1:
        raise TopologyError(
            f"ep={topology.ep} spreads experts over data-parallel replicas, which cannot work independently then. "
            "Set ep to 1."
        )
    if topology.cp > 1:
        raise TopologyError(
            f"cp={topology.cp} shares sequences among data-parallel replicas, which cannot work independently then. "
            "Set cp to 1."
        )


@contextmanager
def independent_replicas(topology: Topology) -> Iterator[Topology]:
    """Make each data-parallel replica a torch.distributed world of its own inside the block, and yield its Topology.

    At the end the replicas rejoin, waiting without a time limit for the last one. Objects that hold process groups are
    only valid in the world in which they were made. Collective over the world. Raises as `check_independent_replicas`;
    a MinitronError of one replica is raised on all ranks after they rejoin.
    """
    check_independent_replicas(topology)
    if topology.dp == 1:
        yield topology
        return
    world, rank = topology.world, topology.rank
    within, replica = topology.tp * topology.pp, topology.dp_rank
    place = topology.tp_rank + topology.tp * topology.pp_rank
    store, meeting = dist.distributed_c10d._get_default_store(), broadcast_object(uuid4().hex)
    own, failure = Topology.of(topology), None
    _move(topology, own, dist.PrefixStore(f"{meeting}/{replica}", store), place, within)
    try:
        yield own
    except MinitronError as error:
        failure = error
    _wait_for_all(dist.PrefixStore(f"{meeting}/done", store), rank, world)
    _move(own, topology, dist.PrefixStore(f"{meeting}/again", store), rank, world)
    with fail_together():
        if failure is not None:
            raise failure


def _move(old: Topology, new: Topology, store: dist.Store, rank: int, world: int) -> None:
    """Leave the process group of one layout and join that of another."""
    old.stop()
    dist.destroy_process_group()
    dist.init_process_group(claim_device(), store=store, rank=rank, world_size=world, timeout=WAIT)
    new.lay_out()


def _wait_for_all(store: dist.Store, rank: int, world: int) -> None:
    """Wait without a time limit: another replica may need hours more, and the launcher notices a dead process."""
    store.set(str(rank), "here")
    while not store.check([str(each) for each in range(world)]):
        time.sleep(WAIT_SECONDS)
