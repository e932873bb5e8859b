"""Progress events: long tasks report their progress to a listener that the caller passes.

Loops send events without knowing who listens; `report/` turns them into progress bars and JSON lines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

__all__ = ["Event", "Listener", "silent"]


@dataclass(frozen=True)
class Event:
    """Progress of a task: `done` of `total` units of the task called `label`."""

    label: str
    """Name of the task: `prepare`, `score`, `correct`, `distill`, ..."""
    done: int
    total: int
    unit: str = "steps"
    values: Mapping[str, float] = field(default_factory=dict)
    """Measurements at this point: `loss` (nats per token), `tokens`, `tokens_per_second`, `lr`, `grad_norm`, ..."""


Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """Ignore the event."""
