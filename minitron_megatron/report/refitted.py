"""Errors of the layers that a refit went through, as rows of text."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import TypedDict

from .. import numbers

__all__ = ["REFITTED", "Fit", "refitted_rows"]

REFITTED = ("layer", "ridge", "calibration error", "after", "held-out error", "after", "after / before")
"""Titles; an error is the squared distance to the teacher's activations, the mean over tokens."""


class Fit(TypedDict):
    """One layer in `pruned/refit.json`."""

    name: str
    ridge: float | None
    tokens: int
    calibration: tuple[float | None, float | None]
    held_out: tuple[float | None, float | None]


def refitted_rows(fits: Sequence[Fit] | None) -> list[tuple[str, ...]]:
    """A row for each layer; a layer that keeps its trimmed weights has no ridge."""
    return [_row(fit) for fit in fits or ()]


def _row(fit: Fit) -> tuple[str, ...]:
    before, after = fit["held_out"]
    ratio = numbers.ABSENT if before is None or after is None or not before else f"{after / before:.3f}"
    ridge = numbers.ABSENT if fit["ridge"] is None else f"{fit['ridge']:g}"
    name = fit["name"].removeprefix("decoder.").removesuffix(".weight")
    return name, ridge, *(_said(error) for error in (*fit["calibration"], *fit["held_out"])), ratio


def _said(error: float | None) -> str:
    return numbers.ABSENT if error is None else f"{error:.4g}"
