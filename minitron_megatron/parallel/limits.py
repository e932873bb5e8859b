"""Limits of torch and of the operating system that a long run, or one of many ranks, would meet."""

from __future__ import annotations

import resource
from datetime import timedelta

from ..errors import TopologyError

__all__ = ["JOIN", "WAIT", "allow_open_files"]

FILES_A_RANK, OTHER_FILES = 6, 512
"""Open files of a process: for each rank of the world (gloo's sockets, in at most three groups, and on rank 0 those of
the store), and besides."""

JOIN = timedelta(minutes=30)
"""Time for all processes to arrive at the start, when no watchdog is at work yet."""

WAIT = timedelta(days=20)
"""Time that ranks wait for each other later, in every process group: longer than any job.

torch's own limits, 30 minutes with gloo and 10 with NCCL, would end ranks that wait for one that rightly works alone
for hours. A run that hangs is ended by the watchdog (`hang_seconds`), and ranks whose peer has died by the launcher.
torch's store counts milliseconds in 32 bits, which are 24 days.
"""


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
