"""Limits of torch and of the operating system that a long run, or one of many ranks, would meet."""

from __future__ import annotations

import resource
from datetime import timedelta

import torch.distributed as dist

from ..errors import TopologyError

__all__ = ["allow_open_files", "wait_without_limit"]

FILES_A_RANK, OTHER_FILES = 6, 512
"""Open files of a process: for each rank of the world (gloo's sockets, in at most three groups, and on rank 0 those of
the store), and besides."""

WAIT = timedelta(days=20)
"""Longer than any job. torch's store counts milliseconds in 32 bits, which are 24 days."""


def wait_without_limit() -> None:
    """Let the ranks wait for each other in every process group of this process as long as it takes.

    torch would end a rank that waits for 30 minutes (gloo) or 10 (NCCL), though another one may rightly work alone for
    hours. A run that hangs is ended by the watchdog (`hang_seconds`), and ranks whose peer has died by the launcher.
    Call it when the groups are complete: connecting keeps torch's limit.
    """
    c10d = dist.distributed_c10d
    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(WAIT, group)
    c10d._get_default_store().set_timeout(WAIT)  # NCCL waits there for the others when it first uses a group


def allow_open_files(world: int) -> None:
    """Raise this process's limit of open files to what `world` ranks need, where it is lower.

    Raises TopologyError where the system does not allow that: gloo would wait for its connections without a message.
    """
    needed = FILES_A_RANK * world + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise TopologyError(
            f"{world} processes need up to {needed} open files each, and this machine allows {hard} (`ulimit -Hn`). "
            "Ask for a higher limit, or start fewer processes."
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
