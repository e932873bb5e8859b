"""Error of a rehearsal."""

from __future__ import annotations

from ..errors import MinitronError

__all__ = ["DeviceFault"]


class DeviceFault(MinitronError):
    """Code that would fail on a GPU, or that a rehearsal cannot follow."""
