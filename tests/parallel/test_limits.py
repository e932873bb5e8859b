"""Limits that only long runs and large worlds meet, scaled down."""

from __future__ import annotations

import os
import resource
import socket
import time
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from minitron_megatron.errors import TopologyError
from minitron_megatron.parallel import Parallel, Topology, all_reduce, gather_objects, independent_replicas, move
from minitron_megatron.parallel.limits import FILES_A_RANK, OTHER_FILES, WAIT, allow_open_files
from minitron_megatron.parallel.patch import patched
from minitron_megatron.parallel.topology import _join
from minitron_megatron.testing import Pool

LIMIT = 3.0
"""Seconds that stand for torch's half an hour."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def limited() -> Any:
    """Make torch's default limit of a process group LIMIT, inside the block."""
    return patched(dist.distributed_c10d, "default_pg_timeout", timedelta(seconds=LIMIT))


def limits() -> set[timedelta]:
    """Return the limits of this process's groups."""
    groups = dist.distributed_c10d._world.pg_map
    return {group._get_backend(torch.device("cpu")).options._timeout for group in groups}


def waits(topology: Topology) -> list[float]:
    """Wait in the world, in a group, for a message and in the store for rank 0, which is late each time."""

    def late() -> bool:
        if topology.rank == 0:
            time.sleep(1.5 * LIMIT)
        return topology.rank == 0

    number = torch.tensor(float(topology.rank + 1))
    late()
    found = [float(sum(gather_objects(topology.rank + 1)))]
    late()
    found.append(float(all_reduce(number.clone(), topology.cp_group)))
    late()
    moved = move(number, (), torch.float32, torch.device("cpu"), source=0, target=1)
    found.append(0.0 if moved is None else float(moved))
    store = dist.distributed_c10d._get_default_store()
    if late():
        store.set("late", "4")
    return [*found, float(store.get("late"))]


def started(topology: Topology, port: int) -> list[float]:
    """Leave the pool's world, start one as a launcher's processes do, and wait in it."""
    topology.stop()
    dist.destroy_process_group()
    with limited(), patch.dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)):
        own = Topology.start(cp=2)
    assert limits() == {WAIT}  # also of the groups that mcore limits to half an hour itself
    return waits(own)


def rejoined(topology: Topology) -> int:
    """Wait in the world that independent replicas make when they meet again."""
    with limited(), independent_replicas(topology):
        pass
    if topology.rank == 0:
        time.sleep(1.5 * LIMIT)
    return sum(gather_objects(topology.rank + 1))


def test_a_rank_may_work_alone_for_longer_than_torch_would_wait(pool: Pool) -> None:
    assert pool.run(started, free_port(), dp=2) == [[3.0, 3.0, 0.0, 4.0], [3.0, 3.0, 1.0, 4.0]]
    assert pool.run(rejoined, dp=2) == [3, 3]


def test_a_process_that_never_comes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Joining has a limit: the watchdog is not at work yet."""
    launched = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("minitron_megatron.parallel.topology.JOIN", timedelta(seconds=LIMIT))
    said = (
        rf"^the processes cannot connect at 127\.0\.0\.1:{launched['MASTER_PORT']} \(MASTER_ADDR:MASTER_PORT\): .+\. "
        r"Start them with another MASTER_PORT, or let launch/local\.sh choose one\.$"
    )
    with pytest.raises(TopologyError, match=said):
        _join()


# ---- open files


def sockets(topology: Topology) -> tuple[int, int]:
    """Return the sockets that the ranks of a world as on GPUs open, and those that they had before.

    torch's `fake` backend stands for NCCL.
    """
    from torch.testing._internal.distributed import fake_pg  # noqa: F401 (registers the backend)

    store = dist.PrefixStore("as on GPUs", dist.distributed_c10d._get_default_store())
    rank, world = topology.rank, topology.world
    topology.stop()
    dist.destroy_process_group()
    before = open_sockets()
    dist.init_process_group("cpu:gloo,cuda:fake", store=store, rank=rank, world_size=world)
    Topology.of(Parallel()).lay_out()
    return open_sockets(), before


def open_sockets() -> int:
    links = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    return sum(os.readlink(link).startswith("socket:") for link in links if os.path.islink(link))


def test_256_ranks_open_fewer_files_than_most_systems_allow(pool: Pool) -> None:
    """The sockets of a rank grow with the world by a constant, two worlds of which tell it."""
    few, more = (max(after - before for after, before in pool.run(sockets, dp=world)) for world in (2, 4))
    a_rank = (more - few) / 2
    assert 1 <= a_rank <= FILES_A_RANK / 2
    assert few + a_rank * 254 < 1024


def test_the_limit_of_open_files_grows_with_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (400, before[1]))
        allow_open_files(256)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (FILES_A_RANK * 256 + OTHER_FILES, before[1])
        allow_open_files(2)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 1024
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 1024))
    with pytest.raises(
        TopologyError, match=r"256 processes need up to 2048 open files each.* allows 1024 .*\. Ask for a higher limit"
    ):
        allow_open_files(256)
