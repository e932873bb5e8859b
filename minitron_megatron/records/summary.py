"""How good each model of a run is: the rows of `summary.json`."""

from __future__ import annotations

from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict

from ..files import read_as

__all__ = ["Row", "read_summary"]


class Row(TypedDict):
    """A model. A number that is not finite is None, as JSON has it."""

    model: str
    parameters: NotRequired[int]
    loss_nats_per_token: NotRequired[float | None]
    perplexity: NotRequired[float | None]
    loss_by_source: NotRequired[dict[str, float | None]]
    tasks: NotRequired[dict[str, float | None]]
    tokens: NotRequired[int]
    seconds: NotRequired[float]


def read_summary(path: Path) -> list[Row]:
    """The rows of a run's `summary.json`; none where it is absent. Raises FileError, which names it."""
    return read_as(path, list[Row]) if path.is_file() else []
