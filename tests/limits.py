"""How long a test waits before it gives up: a slow machine is no hang."""

HANGS = 900.0
"""Seconds."""
