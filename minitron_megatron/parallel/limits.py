"""Limits of torch and of the operating system that a long run, or one of many ranks, would meet."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

__all__ = ["wait_without_limit"]

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
