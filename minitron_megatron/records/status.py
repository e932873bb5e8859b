"""`status.json`: which stages the last command of a run has done, which is at work, and how the command ended."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from typing_extensions import TypedDict

from ..files import read_as

__all__ = ["RunStatus", "StageState", "read_status"]

StageState = Literal["waiting", "done", "running", "ran", "stopped"]
"""`done`: before this command; `ran`: by it; `stopped`: at work when the command failed or was interrupted."""


class RunStatus(TypedDict):
    """State of the last command of a run."""

    stages: dict[str, StageState]
    """Stage -> state, in the order in which they run."""
    since: float
    """Time of the last change, in seconds since 1970."""
    ended: bool
    why: str
    """Reason why the command stopped early; empty if it did not."""
    host: str
    process: int
    """Process ID of rank 0 on `host`."""


def read_status(path: Path) -> RunStatus | None:
    """Return a run's status, or None without one. Raises FileError where it is damaged."""
    return read_as(path, RunStatus) if path.is_file() else None
