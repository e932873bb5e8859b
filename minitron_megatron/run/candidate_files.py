"""Measurements of a search's candidates while it runs, in one file per candidate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from ..errors import FileError
from ..files import read_as
from ..search import Curve

__all__ = ["AfterCut", "Distilled", "Part", "curve_of", "finite", "number", "read_part"]

Part = dict[str, Any]
"""Measurements of a candidate, `AfterCut` or `Distilled`."""


class AfterCut(TypedDict):
    """Measurements right after pruning."""

    loss: float | None
    score: NotRequired[float | None]
    """Score at the task that chooses; more is better."""


class Distilled(TypedDict):
    """Measurements during light distillation."""

    curve: dict[str, float | None]
    """Step -> held-out loss."""
    score: NotRequired[float | None]


def read_part(path: Path, kind: type) -> Part:
    part: Part = dict(read_as(path, kind))
    if not all(step.isdecimal() for step in part.get("curve", {})):
        raise FileError(f"{path} has a curve whose steps are not numbers. Remove it to measure the candidate again.")
    return part


def finite(value: float | None) -> float | None:
    """Return the value, or None if it is not finite, since JSON has no NaN."""
    return value if value is not None and math.isfinite(value) else None


def number(loss: float | None) -> float:
    return math.inf if loss is None else loss


def curve_of(part: Part) -> Curve:
    return {int(step): number(loss) for step, loss in part.get("curve", {}).items()}
