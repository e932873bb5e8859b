"""How long work tells of itself: one kind of event, sent to a listener that the caller passes.

Loops send events and know nothing of who listens; `report/` turns them into progress bars and JSON lines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

__all__ = ["Event", "Listener", "silent"]


@dataclass(frozen=True)
class Event:
    """A piece of long work went on: `done` of `total` units of the work called `label`."""

    label: str
    """What is being done: `prepare`, `score`, `correct`, `distill`, ..."""
    done: int
    total: int
    unit: str = "steps"
    values: Mapping[str, float] = field(default_factory=dict)
    """Measurements at this point: `loss` (nats per token), `tokens`, `tokens_per_second`, `lr`, `grad_norm`, ..."""


Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """The listener that ignores everything."""
