"""Scores, and what each cut kept of them, as rows of text.

Scores, kept units and margins come as plain mappings: axis -> layer -> value, the layer None where all layers share the
axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from . import numbers
from .plots import ByLayer

__all__ = ["CUT", "KEPT", "SCORED", "cut_rows", "kept_rows", "score_rows", "shares"]

Row = tuple[str, ...]
SCORED = ("axis", "layer", "units", "best", "median", "least", "best to least")
CUT = ("axis", "layer", "kept", "of", "of the score", "margin")
KEPT = ("axis", "kept", "of", "of the score", "closest cut's margin")
BLOCKS = " ▁▂▃▄▅▆▇█"
CURVE_WIDTH = 24


def score_rows(scores: ByLayer[Sequence[float]]) -> list[Row]:
    """A row an axis and layer, under `SCORED`; the rows of an axis together are its heat map."""
    rows: list[Row] = []
    for axis, layers in scores.items():
        for layer, values in layers.items():
            ranked = sorted(values, reverse=True)
            ends = (_score(ranked[0]), _score(median(ranked)), _score(ranked[-1])) if ranked else (numbers.ABSENT,) * 3
            rows.append((axis, _layer(layer), numbers.count(len(values)), *ends, _curve(ranked)))
    return rows


def _curve(ranked: Sequence[float]) -> str:
    """Values from the best to the least as blocks whose height is the share of the best."""
    best, width = max(ranked, default=0.0), min(len(ranked), CURVE_WIDTH)
    if best <= 0:
        return ""
    sampled = [ranked[place * (len(ranked) - 1) // max(width - 1, 1)] for place in range(width)]
    return "".join(BLOCKS[math.ceil(8 * max(value, 0.0) / best)] for value in sampled)


def cut_rows(plan: ByLayer[Sequence[int]], scores: ByLayer[Sequence[float]], margins: ByLayer[float]) -> list[Row]:
    """A row an axis and layer, under `CUT`: units kept, units there were, share of the score, the cut's margin."""
    kept = shares(plan, scores)
    return [
        (
            axis,
            _layer(layer),
            numbers.count(len(units)),
            numbers.count(len(scores[axis][layer]) if layer in scores.get(axis, {}) else None),
            f"{kept[axis][layer]:.1%}" if layer in kept.get(axis, {}) else numbers.ABSENT,
            _margin(margins.get(axis, {}).get(layer)),
        )
        for axis, layers in plan.items()
        for layer, units in layers.items()
    ]


def kept_rows(plan: ByLayer[Sequence[int]], scores: ByLayer[Sequence[float]], margins: ByLayer[float]) -> list[Row]:
    """`cut_rows` with a row an axis, under `KEPT`: spans over its layers that stay, and the closest of its cuts."""
    rows: list[Row] = []
    kept = shares(plan, scores)
    for axis, layers in plan.items():
        there = max(map(len, scores.get(axis, {}).values()), default=None)
        closest = min(margins.get(axis, {}).values(), default=None)
        share = _span(kept.get(axis, {}).values(), "{:.1%}".format)
        rows.append(
            (axis, _span(map(len, layers.values()), numbers.count), numbers.count(there), share, _margin(closest))
        )
    return rows


def shares(plan: ByLayer[Sequence[int]], scores: ByLayer[Sequence[float]]) -> dict[str, dict[int | None, float]]:
    """Of each cut, the sum of the kept units' scores over that of all; absent where that is zero or not known."""
    found: dict[str, dict[int | None, float]] = {}
    for axis, layers in plan.items():
        for layer, units in layers.items():
            values = scores.get(axis, {}).get(layer, ())
            if sum(values) > 0:
                found.setdefault(axis, {})[layer] = sum(values[unit] for unit in units) / sum(values)
    return found


def _span(values: Any, write: Callable[[Any], str]) -> str:
    written = [write(value) for value in sorted(values)]
    if not written:
        return numbers.ABSENT
    return written[0] if written[0] == written[-1] else f"{written[0]} to {written[-1]}"


def _layer(layer: int | None) -> str:
    return "all" if layer is None else str(layer)


def _score(value: float) -> str:
    return f"{value:.3g}"


def _margin(margin: float | None) -> str:
    return numbers.ABSENT if margin is None or not math.isfinite(margin) else f"{margin:.1e}"
