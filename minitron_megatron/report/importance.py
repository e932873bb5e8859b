"""Importance scores, and their share that pruning kept, as table rows.

Scores, kept units and margins come as plain mappings: axis -> layer -> value. The layer is None if all layers share the
axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median

from .. import numbers
from .plots import ByLayer

__all__ = ["CUT", "KEPT", "SCORED", "cut_rows", "kept_rows", "score_rows", "shares"]

Row = tuple[str, ...]
SCORED = ("axis", "layer", "units", "highest", "median", "lowest", "highest to lowest")
CUT = ("axis", "layer", "kept", "of", "share of score", "margin")
KEPT = ("axis", "kept", "of", "share of score", "smallest margin")
BLOCKS = " ▁▂▃▄▅▆▇█"
CURVE_WIDTH = 24


def score_rows(scores: ByLayer[Sequence[float]]) -> list[Row]:
    """Return a row per axis and layer, with the columns `SCORED`; the last column shows the sorted scores as bars."""
    rows: list[Row] = []
    for axis, layers in scores.items():
        for layer, values in layers.items():
            ranked = sorted(values, reverse=True)
            ends = (_score(ranked[0]), _score(median(ranked)), _score(ranked[-1])) if ranked else (numbers.ABSENT,) * 3
            rows.append((axis, _layer(layer), numbers.count(len(values)), *ends, _curve(ranked)))
    return rows


def _curve(ranked: Sequence[float]) -> str:
    """Return sorted values as a text curve; the height of a block is the value's share of the best."""
    best, width = max(ranked, default=0.0), min(len(ranked), CURVE_WIDTH)
    if best <= 0:
        return ""
    sampled = [ranked[place * (len(ranked) - 1) // max(width - 1, 1)] for place in range(width)]
    return "".join(BLOCKS[math.ceil(8 * max(value, 0.0) / best)] for value in sampled)


def cut_rows(
    plan: ByLayer[Sequence[int]],
    scores: ByLayer[Sequence[float]],
    margins: ByLayer[float],
    totals: Mapping[str, int] | None = None,
) -> list[Row]:
    """Return a row per axis and layer, with the columns `CUT`: units kept, units before, share of score, margin.

    totals: axis -> units before, where they are known without scores.
    """
    kept = shares(plan, scores)
    return [
        (
            axis,
            _layer(layer),
            numbers.count(len(units)),
            numbers.count(len(scores[axis][layer]) if layer in scores.get(axis, {}) else (totals or {}).get(axis)),
            f"{kept[axis][layer]:.1%}" if layer in kept.get(axis, {}) else numbers.ABSENT,
            _margin(margins.get(axis, {}).get(layer)),
        )
        for axis, layers in plan.items()
        for layer, units in layers.items()
    ]


def kept_rows(
    plan: ByLayer[Sequence[int]],
    scores: ByLayer[Sequence[float]],
    margins: ByLayer[float],
    totals: Mapping[str, int] | None = None,
) -> list[Row]:
    """Return a row per axis, with the columns `KEPT`: ranges over the kept layers, and the smallest margin.

    totals: axis -> units before, where they are known without scores.
    """
    rows: list[Row] = []
    kept = shares(plan, scores)
    for axis, layers in plan.items():
        total = max(map(len, scores.get(axis, {}).values()), default=(totals or {}).get(axis))
        smallest = min(margins.get(axis, {}).values(), default=None)
        share = _span(kept.get(axis, {}).values(), "{:.1%}".format)
        rows.append(
            (axis, _span(map(len, layers.values()), numbers.count), numbers.count(total), share, _margin(smallest))
        )
    return rows


def shares(plan: ByLayer[Sequence[int]], scores: ByLayer[Sequence[float]]) -> dict[str, dict[int | None, float]]:
    """Return each cut's sum of the kept units' scores over that of all units; absent if the latter is 0 or unknown."""
    found: dict[str, dict[int | None, float]] = {}
    for axis, layers in plan.items():
        for layer, units in layers.items():
            values = scores.get(axis, {}).get(layer, ())
            if sum(values) > 0:
                found.setdefault(axis, {})[layer] = sum(values[unit] for unit in units) / sum(values)
    return found


def _span(values: Iterable[float], write: Callable[[float], str]) -> str:
    written = [write(value) for value in sorted(values)]
    if not written:
        return numbers.ABSENT
    return written[0] if written[0] == written[-1] else f"{written[0]} to {written[-1]}"


def _layer(layer: int | None) -> str:
    return "all" if layer is None else str(layer)


def _score(value: float) -> str:
    return f"{value:#.3g}".removesuffix(".")


def _margin(margin: float | None) -> str:
    return numbers.ABSENT if margin is None or not math.isfinite(margin) else f"{margin:.1e}"
