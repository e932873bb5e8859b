"""Ranking of candidates: rank correlation over training, Pareto front, knee."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .halving import Curve

__all__ = ["front", "knee", "rank_correlation", "settled"]


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Return Spearman's rank correlation; ties share their mean rank; NaN if all values of a sequence are equal.

    Raises ValueError for sequences of different lengths.
    """
    a, b = _ranks(one), _ranks(other)
    mean = (len(a) + 1) / 2
    spread = [sum((rank - mean) ** 2 for rank in ranks) for ranks in (a, b)]
    covariance = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    return covariance / (spread[0] * spread[1]) ** 0.5 if spread[0] and spread[1] else float("nan")


def _ranks(values: Sequence[float]) -> list[float]:
    values = [math.inf if math.isnan(value) else value for value in values]  # NaN counts as the worst loss
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) + 1) / 2 for value in values]


def settled(curves: Mapping[str, Curve]) -> list[tuple[int, float]]:
    """Return (step, rank correlation of its losses with those of the last step) for each step common to all curves.

    Only curves that reach the last step count; successive halving ended the others early.
    """
    last = max((step for curve in curves.values() for step in curve), default=0)
    complete = [curve for curve in curves.values() if last in curve]
    steps = sorted(set.intersection(*(set(curve) for curve in complete))) if len(complete) > 1 else []
    ends = [curve[last] for curve in complete]
    return [(step, rank_correlation([curve[step] for curve in complete], ends)) for step in steps]


Point = tuple[float, ...]
"""Values to minimise: the loss first, then costs."""


def front(points: Mapping[str, Point]) -> list[str]:
    """Return the names of the Pareto-optimal points, in order of their loss; non-finite points are excluded."""
    points = {name: point for name, point in points.items() if all(map(math.isfinite, point))}
    best = [name for name, point in points.items() if not any(_dominates(other, point) for other in points.values())]
    return sorted(best, key=lambda name: points[name])


def _dominates(one: Point, other: Point) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def knee(points: Mapping[str, Point]) -> str:
    """Return the name on the Pareto front nearest to (0, 0), with loss and cost scaled to [0, 1] along the front.

    Raises ValueError if no point is finite.
    """
    names = front(points)
    ends = [(min(axis), max(axis)) for axis in zip(*(points[name] for name in names), strict=True)]

    def distance(name: str) -> float:
        pairs = zip(points[name], ends, strict=True)
        return sum(((value - low) / (high - low or 1)) ** 2 for value, (low, high) in pairs)

    return min(names, key=distance)
