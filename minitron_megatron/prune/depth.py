"""DepthScores -> the layers to keep."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

from .. import numbers
from ..errors import PlanError
from ..records import SAFE_MARGIN, DepthScores

__all__ = ["choose_layers"]


def choose_layers(depth: DepthScores, *, keep: int, contiguous: bool = True) -> tuple[int, ...]:
    """Return the layers to keep, ascending, for `choose(scores, layers=...)` or a plan for depth alone.

    contiguous: remove the block whose removal hurts least, as in Minitron's second paper. Otherwise remove layers in
    the measured greedy order; if fewer were measured greedily, remove those that hurt least on their own. Of equal
    layers the first is removed. Raises PlanError for a count out of range, and if the needed measurement is missing.
    """
    layers = depth.shape.layers
    if not 1 <= keep <= layers:
        raise PlanError(f"axis layers should keep {keep} of {layers}. Ask for 1 to {layers}.")
    count = layers - keep
    if not count:
        return tuple(range(layers))
    for (first, length), value in depth.blocks.items():
        if not math.isfinite(value):
            raise PlanError(
                f"leaving out layers {first} to {first + length - 1} measured {value}, which cannot be ranked. "
                "Measure it again."
            )
    removed = _block(depth, count) if contiguous else _scattered(depth, count)
    return tuple(layer for layer in range(layers) if layer not in removed)


def _block(depth: DepthScores, count: int) -> Sequence[int]:
    values = depth.of_length(count)
    if not values:
        measured = ", ".join(map(str, depth.lengths)) or "none"
        raise PlanError(
            f"a block of {numbers.counted(count, 'layer')} is to be removed, but measured were blocks of these "
            f"lengths: {measured}. Measure blocks of {count}, or keep another number of layers."
        )
    (first,) = _best(depth, values, 1)
    return range(first, first + count)


def _scattered(depth: DepthScores, count: int) -> Sequence[int]:
    if count <= len(depth.greedy):
        return [layer for layer, _ in depth.greedy[:count]]
    singles = depth.of_length(1)
    if not singles:
        raise PlanError(
            f"the layers to be removed one by one are {count}, but only {len(depth.greedy)} were measured greedily. "
            f"Measure {count} of them greedily, or measure single layers."
        )
    return _best(depth, singles, count)


def _best(depth: DepthScores, values: Mapping[int, float], count: int) -> list[int]:
    """Return the `count` keys that are best to remove, the first of equal ones; warn if the next one is as good."""
    order = sorted(values, key=lambda first: values[first] if depth.lower_is_better else -values[first])
    if count < len(order):
        last, following = values[order[count - 1]], values[order[count]]
        if abs(following - last) <= SAFE_MARGIN * abs(last):
            warnings.warn(
                f"the choice of layers has a margin below {SAFE_MARGIN:g}: another layout may keep other layers",
                stacklevel=4,
            )
    return order[:count]
