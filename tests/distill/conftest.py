"""Tiny checkpoints for the tests of this folder."""

from tests.tiny import checkpoints

__all__ = ["checkpoints"]
