"""Data-parallel replicas as worlds of their own, for a while."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from uuid import uuid4

import torch.distributed as dist

from ..errors import MinitronError, TopologyError
from .collectives import broadcast_object, fail_together
from .topology import Topology, claim_device

__all__ = ["check_independent_replicas", "independent_replicas"]

WAIT_SECONDS = 0.2


def check_independent_replicas(topology: Topology) -> None:
    """Raises TopologyError where replicas hold experts or sequences between them."""
    if topology.ep > 1:
        raise TopologyError(f"ep={topology.ep} spreads experts over replicas, which cannot part. Set ep to 1.")
    if topology.cp > 1:
        raise TopologyError(f"cp={topology.cp} shares sequences among replicas, which cannot part. Set cp to 1.")


@contextmanager
def independent_replicas(topology: Topology) -> Iterator[Topology]:
    """Inside, each data-parallel replica is a world of its own, laid out as what is yielded; in the end all are one
    again, once the last is there, however long that takes. What knows a group of one world is of no use in the other.

    Collective over the world. Raises what `check_independent_replicas` does; a MinitronError of one replica is raised
    on all ranks once they are together.
    """
    check_independent_replicas(topology)
    if topology.dp == 1:
        yield topology
        return
    world, rank = topology.world, topology.rank
    within, replica = topology.tp * topology.pp, topology.dp_rank
    place = topology.tp_rank + topology.tp * topology.pp_rank
    store, meeting = dist.distributed_c10d._get_default_store(), broadcast_object(uuid4().hex)
    own, failure = replace(topology), None
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
    """Leaves the processes of one layout and joins those of another."""
    old.stop()
    dist.destroy_process_group()
    dist.init_process_group(claim_device(), store=store, rank=rank, world_size=world)
    new.lay_out()


def _wait_for_all(store: dist.Store, rank: int, world: int) -> None:
    """No time limit: another replica may have hours to go, and whoever dies is seen by the launcher."""
    store.set(str(rank), "here")
    while not store.check([str(each) for each in range(world)]):
        time.sleep(WAIT_SECONDS)
