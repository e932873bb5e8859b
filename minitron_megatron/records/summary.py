"""Rows of `summary.json`: the quality of each model of a run."""

from __future__ import annotations

from pathlib import Path
from typing import NotRequired

from typing_extensions import TypedDict

from ..files import read_as

__all__ = ["Row", "read_summary"]


class Row(TypedDict):
    """Results of one model. A number that is not finite is None (null in JSON)."""

    model: str
    parameters: NotRequired[int]
    loss_nats_per_token: NotRequired[float | None]
    perplexity: NotRequired[float | None]
    loss_by_source: NotRequired[dict[str, float | None]]
    tasks: NotRequired[dict[str, float | None]]
    tokens: NotRequired[int]
    seconds: NotRequired[float]


def read_summary(path: Path) -> list[Row]:
    """Return the rows of a run's `summary.json`, or an empty list without one. Raises FileError where it is damaged."""
    return read_as(path, list[Row]) if path.is_file() else []
