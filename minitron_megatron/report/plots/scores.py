"""Plot of importance scores, with kept and pruned units.

Scores and kept units come as plain mappings: axis -> layer -> value. The layer is None if all layers share the axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ... import numbers
from .style import COLOURS, PALE, count_axis, heat_map, layer_bar, layer_colours, legend_outside, log_axis, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ByLayer", "importance"]

Value = TypeVar("Value")
ByLayer = Mapping[str, Mapping[int | None, Value]]
"""Axis -> layer -> value; the layer is None if all layers share the axis."""
Scored = Mapping[int | None, Sequence[float]]
Kept = Mapping[int | None, frozenset[int]]


def importance(scores: ByLayer[Sequence[float]], plan: ByLayer[Sequence[int]], path: Path) -> Path | None:
    """Plot one row of panels per axis: the sorted scores, one line per layer, and the same as a heat map.

    Kept units are drawn in full colour, pruned ones faintly. Without a plan for an axis all its units count as kept.
    """
    scored = {axis: {layer: values for layer, values in of.items() if len(values)} for axis, of in scores.items()}
    scored = {axis: layers for axis, layers in scored.items() if layers}
    if not scored:
        return None
    with new_figure(path, 10.5, 3.1 * len(scored)) as figure:
        grid = figure.add_gridspec(len(scored), 2, width_ratios=(1.15, 1))
        for place, (axis, layers) in enumerate(scored.items()):
            kept = {layer: _kept(plan, axis, layer, len(values)) for layer, values in layers.items()}
            if axis == "layers":
                _depth(figure.add_subplot(grid[place, :]), layers[None], kept[None])
            elif len(layers) == 1:
                _curves(figure.add_subplot(grid[place, :]), axis, layers, kept)
            else:
                _curves(figure.add_subplot(grid[place, 0]), axis, layers, kept)
                _map(figure.add_subplot(grid[place, 1]), axis, layers, kept)
    return path


def _kept(plan: ByLayer[Sequence[int]], axis: str, layer: int | None, size: int) -> frozenset[int]:
    """Return the kept units of a layer: none of a removed layer, all of an axis that the plan does not prune."""
    whole = frozenset(range(size))
    dropped = layer is not None and layer not in plan.get("layers", {}).get(None, (layer,))
    return frozenset() if dropped else frozenset(plan.get(axis, {}).get(layer, whole))


def _ranked(values: Sequence[float]) -> list[int]:
    """Return units from the best to the worst; of equal scores the lower index comes first."""
    return sorted(range(len(values)), key=lambda unit: (-values[unit], unit))


def _share(kept: Kept, layers: Scored) -> str:
    """Return a text such as `512 of 1,024 kept`, a range if layers differ; removed layers do not count."""
    sizes = sorted({len(units) for units in kept.values() if units}) or [0]
    total = max(map(len, layers.values()))
    span = numbers.count(sizes[0]) + (f" to {numbers.count(sizes[-1])}" if len(sizes) > 1 else "")
    removed = sum(not units for units in kept.values())
    return f"{span} of {numbers.count(total)} kept" + (
        f", {numbers.counted(removed, 'layer')} removed" if removed else ""
    )


def _depth(axes: Axes, values: Sequence[float], kept: frozenset[int]) -> None:
    """Draw the layers' scores as bars in the order of depth."""
    colours = [COLOURS[0] if layer in kept else PALE for layer in range(len(values))]
    axes.bar(range(len(values)), values, color=colours)
    hint = " (pruned: grey)" * (len(kept) < len(values))
    axes.set(title=f"layers: {len(kept)} of {len(values)} kept{hint}", ylabel="score")
    count_axis(axes, "layer")
    axes.grid(visible=False, axis="x")
    axes.margins(x=0.01)


def _curves(axes: Axes, axis: str, layers: Scored, kept: Kept) -> None:
    """Draw scores from the best unit to the worst, one line per layer."""
    colours = layer_colours(list(layers))
    for layer, values in layers.items():
        order = _ranked(values)
        ranks = range(1, len(order) + 1)
        strong = [values[unit] if unit in kept[layer] else math.nan for unit in order]
        dots: dict[str, Any] = {"marker": "o", "markersize": 2.8} if len(order) <= 64 else {}
        label = "all layers" if layer is None else f"layer {layer}"
        axes.plot(ranks, [values[unit] for unit in order], color=colours[layer], alpha=0.3, linewidth=1.0, **dots)
        axes.plot(ranks, strong, color=colours[layer], label=label, **dots)
    _mark_kept(axes, layers, kept)
    axes.set(title=f"{axis}: {_share(kept, layers)}", ylabel="score")
    _log_where_wide(axes, [value for values in layers.values() for value in values])
    count_axis(axes, f"units of {axis}, best first")
    axes.margins(x=0.01)
    if 1 < len(layers) <= 12:
        legend_outside(axes)
    elif len(layers) > 1:
        layer_bar(axes, list(layers))


def _mark_kept(axes: Axes, layers: Scored, kept: Kept) -> None:
    """Shade the best ranks if every kept layer keeps exactly its best units, and some unit is pruned."""
    remaining = {layer: units for layer, units in kept.items() if units}
    best = all(units == set(_ranked(layers[layer])[: len(units)]) for layer, units in remaining.items())
    counts = {len(units) for units in remaining.values()}
    if best and len(counts) == 1 and counts != {max(map(len, layers.values()))}:
        (count,) = counts
        axes.axvspan(0.5, count + 0.5, color=COLOURS[0], alpha=0.07, linewidth=0)
        axes.axvline(count + 0.5, color=COLOURS[0], linewidth=1.0, linestyle="--")


def _log_where_wide(axes: Axes, values: Sequence[float]) -> None:
    if min(values) > 0 and max(values) > 20 * min(values):
        log_axis(axes, values, "{:g}".format)


def _map(axes: Axes, axis: str, layers: Scored, kept: Kept) -> None:
    """Draw a heat map of layer by rank: score over the layer's best, in colour for kept and grey for pruned units."""
    width = max(map(len, layers.values()))
    strong, faint = [], []
    for layer, values in layers.items():
        order = _ranked(values)
        best = max(values[order[0]], 0.0) or 1.0
        blank = [math.nan] * (width - len(order))
        strong.append([values[unit] / best if unit in kept[layer] else math.nan for unit in order] + blank)
        faint.append([math.nan if unit in kept[layer] else values[unit] / best for unit in order] + blank)
    heat_map(axes, strong, faint, extent=(0.5, width + 0.5, len(layers) - 0.5, -0.5))
    axes.set(title="share of the layer's best (pruned: grey)", ylabel="layer")
    step = max(1, len(layers) // 8)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in list(layers)[::step]])
    count_axis(axes, f"units of {axis}, best first")
