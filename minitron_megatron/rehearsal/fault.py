"""Errors of a rehearsal."""

from __future__ import annotations

from ..errors import MinitronError

__all__ = ["DeviceFault", "DeviceFull"]


class DeviceFault(MinitronError):
    """Code that would fail on a GPU, or that a rehearsal cannot follow."""


class DeviceFull(MinitronError):
    """Tensor that does not fit the device, of a rehearsal that stops there."""
