"""The tiny checkpoints."""

from tests.tiny import checkpoints

__all__ = ["checkpoints"]
