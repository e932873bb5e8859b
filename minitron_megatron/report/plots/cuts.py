"""How clear each cut is."""

from __future__ import annotations

import math
from pathlib import Path

from .scores import ByLayer
from .style import ALARM, COLOURS, legend_outside, new_figure

__all__ = ["LEAST_MARGIN", "margins"]

LEAST_MARGIN = 1e-5
"""Below this relative margin of a cut, another parallel layout may keep other units."""


def margins(of_cuts: ByLayer[float], path: Path) -> Path | None:
    """Each cut's relative margin on a log scale, with the line below which layouts may disagree.

    A margin of zero (an exact tie) stands at the lower edge; one that is not finite (nothing was cut) is left out.
    """
    cuts = {axis: {layer: it for layer, it in of.items() if math.isfinite(it)} for axis, of in of_cuts.items()}
    cuts = {axis: layers for axis, layers in cuts.items() if layers}
    if not cuts:
        return None
    layers = sorted({layer for of_axis in cuts.values() for layer in of_axis if layer is not None})
    shared = min(layers, default=0) - max(1.5, 0.08 * len(layers))
    edge = min(it for of in cuts.values() for it in (*of.values(), LEAST_MARGIN) if it > 0) / 10
    with new_figure(path, 9.0, 3.6) as figure:
        axes = figure.subplots()
        axes.set(
            title="How clear each cut is", xlabel="layer", ylabel="relative margin: last kept\nagainst first cut unit"
        )
        axes.set_yscale("log")
        axes.axhspan(edge / 3, LEAST_MARGIN, color=ALARM, alpha=0.06, linewidth=0)
        axes.axhline(LEAST_MARGIN, color=ALARM, linewidth=1.2, linestyle="--", label="too close to call below")
        for (axis, of_axis), colour, marker in zip(cuts.items(), COLOURS * 9, "osD^vPX" * 9, strict=False):
            x = [shared if layer is None else layer for layer in of_axis]
            y = [max(margin, edge) for margin in of_axis.values()]
            axes.plot(x, y, marker, color=colour, label=axis, markersize=6)
        axes.set_ylim(bottom=edge / 3)
        named: dict[float, str] = {layer: str(layer) for layer in layers[:: max(1, len(layers) // 16)]}
        if any(None in of_axis for of_axis in cuts.values()):
            named[shared] = "shared"
        axes.set_xticks(list(named), list(named.values()))
        legend_outside(axes)
    return path
