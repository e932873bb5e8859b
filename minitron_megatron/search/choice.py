"""Ranks, when they settle, and which candidate it shall be."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from .halving import Curve

__all__ = ["front", "knee", "rank_correlation", "settled"]


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's: 1 where both put things in the same order, ties sharing their mean rank; NaN where one says nothing.

    Raises ValueError for sequences of unlike lengths.
    """
    a, b = _ranks(one), _ranks(other)
    mean = (len(a) + 1) / 2
    spread = [sum((rank - mean) ** 2 for rank in ranks) for ranks in (a, b)]
    together = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    return together / (spread[0] * spread[1]) ** 0.5 if spread[0] and spread[1] else float("nan")


def _ranks(values: Sequence[float]) -> list[float]:
    values = [math.inf if math.isnan(value) else value for value in values]  # a NaN is the worst loss
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) + 1) / 2 for value in values]


def settled(curves: Mapping[str, Curve]) -> list[tuple[int, float]]:
    """(step, rank correlation of the losses there with those at the last step) at each step that all curves have.

    Of the curves that reach the last step: those that halving took out say nothing of it.
    """
    last = max((step for curve in curves.values() for step in curve), default=0)
    whole = [curve for curve in curves.values() if last in curve]
    steps = sorted(set.intersection(*(set(curve) for curve in whole))) if len(whole) > 1 else []
    ends = [curve[last] for curve in whole]
    return [(step, rank_correlation([curve[step] for curve in whole], ends)) for step in steps]


Point = tuple[float, ...]
"""What of each there should be least: the loss first, then costs."""


def front(points: Mapping[str, Point]) -> list[str]:
    """The names that no other beats: none has everything as small, and something smaller. In order of their loss. A
    point that is not finite is none of them."""
    points = {name: point for name, point in points.items() if all(map(math.isfinite, point))}
    best = [name for name, point in points.items() if not any(_beats(other, point) for other in points.values())]
    return sorted(best, key=lambda name: points[name])


def _beats(one: Point, other: Point) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def knee(points: Mapping[str, Point]) -> str:
    """Of the front of (loss, cost), where both are scaled to run from 0 to 1 along it, the one nearest to (0, 0).

    Raises ValueError where no point is finite.
    """
    names = front(points)
    ends = [(min(axis), max(axis)) for axis in zip(*(points[name] for name in names), strict=True)]

    def distance(name: str) -> float:
        pairs = zip(points[name], ends, strict=True)
        return sum(((value - low) / (high - low or 1)) ** 2 for value, (low, high) in pairs)

    return min(names, key=distance)
