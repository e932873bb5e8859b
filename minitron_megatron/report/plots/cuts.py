"""Plots of the cuts: relative margin, and share of the score that is kept."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from ...records import SAFE_MARGIN
from .scores import ByLayer
from .style import ALARM, COLOURS, legend_outside, log_axis, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["margins", "shares"]


def margins(of_cuts: ByLayer[float], path: Path) -> Path | None:
    """Plot each cut's relative margin on a log scale, with the line below which layouts may disagree.

    A margin of zero (an exact tie) is drawn at the lower edge; one that is not finite (nothing was pruned) is left out.
    """
    cuts = {axis: {layer: it for layer, it in of.items() if math.isfinite(it)} for axis, of in of_cuts.items()}
    if not any(cuts.values()):
        return None
    edge = min(it for of in cuts.values() for it in (*of.values(), SAFE_MARGIN) if it > 0) / 10
    drawn = {axis: {layer: max(margin, edge) for layer, margin in of.items()} for axis, of in cuts.items()}
    with new_figure(path, 9.0, 3.6) as figure:
        axes = figure.subplots()
        axes.set(title="Margin of each cut", ylabel="relative margin: last kept\nvs. first pruned unit")
        log_axis(axes, [SAFE_MARGIN, *(margin for of in drawn.values() for margin in of.values())], "{:.0e}".format)
        axes.axhspan(edge / 3, SAFE_MARGIN, color=ALARM, alpha=0.06, linewidth=0)
        axes.axhline(SAFE_MARGIN, color=ALARM, linewidth=1.2, linestyle="--", label="below: may depend on layout")
        _by_layer(axes, drawn)
        axes.set_ylim(bottom=edge / 3)
        legend_outside(axes)
    return path


def shares(of_cuts: ByLayer[float], path: Path) -> Path | None:
    """Plot the share of the score that each cut keeps."""
    cuts = {axis: of for axis, of in of_cuts.items() if of}
    if not cuts:
        return None
    with new_figure(path, 9.0, 3.4) as figure:
        axes = figure.subplots()
        axes.set(title="Share of the score that each cut keeps", ylabel="share of the score")
        _by_layer(axes, cuts)
        axes.set_ylim(0, 1.03)
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        legend_outside(axes)
    return path


def _by_layer(axes: Axes, values: ByLayer[float]) -> None:
    """Draw one marker per axis and layer; an axis that all layers share is drawn before the first layer."""
    values = {axis: of_axis for axis, of_axis in values.items() if of_axis}
    layers = sorted({layer for of_axis in values.values() for layer in of_axis if layer is not None})
    shared = min(layers, default=0) - max(1.5, 0.08 * len(layers))
    for (axis, of_axis), colour, marker in zip(values.items(), COLOURS * 9, "osD^vPX" * 9, strict=False):
        x = [shared if layer is None else layer for layer in of_axis]
        axes.plot(x, list(of_axis.values()), marker, color=colour, label=axis, markersize=6)
    named: dict[float, str] = {layer: str(layer) for layer in layers[:: math.ceil(len(layers) / 16) or 1]}
    if any(None in of_axis for of_axis in values.values()):
        named[shared] = "shared"
    axes.set_xticks(list(named), list(named.values()))
    axes.set_xlabel("layer")
