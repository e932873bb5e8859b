"""DepthScores -> the layers that stay."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

from ..errors import PlanError
from ..records import DepthScores
from .choose import SAFE_MARGIN

__all__ = ["choose_layers"]


def choose_layers(depth: DepthScores, *, keep: int, contiguous: bool = True) -> tuple[int, ...]:
    """The layers that stay, ascending: for `choose(scores, layers=...)`, or a plan of its own.

    contiguous: the layers that go are the block whose loss hurts least, as in Minitron's second paper. Otherwise they
    are those that were taken one by one, or, where so many were not, those that hurt least each on its own. Of equals
    the first goes. Raises PlanError for a count out of range, and where what this choice needs was not measured.
    """
    layers = depth.shape.layers
    if not 1 <= keep <= layers:
        raise PlanError(f"axis layers should keep {keep} of {layers}. Ask for 1 to {layers}.")
    go = layers - keep
    if not go:
        return tuple(range(layers))
    for (first, length), value in depth.blocks.items():
        if not math.isfinite(value):
            raise PlanError(
                f"layers {first} to {first + length - 1} measure {value}, which ranks nothing. Measure them again."
            )
    gone = _block(depth, go) if contiguous else _scattered(depth, go)
    return tuple(layer for layer in range(layers) if layer not in gone)


def _block(depth: DepthScores, go: int) -> Sequence[int]:
    values = depth.of_length(go)
    if not values:
        there = ", ".join(map(str, depth.lengths)) or "no"
        raise PlanError(
            f"a block of {go} layers should go, and only blocks of {there} layers were measured. "
            f"Measure blocks of {go}, or keep another number."
        )
    (first,) = _best(depth, values, 1)
    return range(first, first + go)


def _scattered(depth: DepthScores, go: int) -> Sequence[int]:
    if go <= len(depth.greedy):
        return [layer for layer, _ in depth.greedy[:go]]
    singles = depth.of_length(1)
    if not singles:
        raise PlanError(
            f"{go} layers should go one by one, and {len(depth.greedy)} were taken so. "
            f"Measure {go} of them greedily, or single layers."
        )
    return _best(depth, singles, go)


def _best(depth: DepthScores, values: Mapping[int, float], count: int) -> list[int]:
    """The `count` keys that are best to lose, of equals the first; warns where the next one is as good."""
    order = sorted(values, key=lambda first: values[first] if depth.lower_is_better else -values[first])
    if count < len(order):
        last, following = values[order[count - 1]], values[order[count]]
        if abs(following - last) <= SAFE_MARGIN * abs(last):
            warnings.warn(
                f"the choice of layers has a margin below {SAFE_MARGIN:g}: another layout may keep other layers",
                stacklevel=4,
            )
    return order[:count]
