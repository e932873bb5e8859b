"""Plot a metric of the network without some of its layers, as in figures 8 and 9 of Minitron's second paper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ... import numbers
from .style import COLOURS, GREY, count_axis, legend_outside, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["DepthCurves", "depth_curves"]

NAMES = {
    "bi": "block importance",
    "loss": "cross-entropy\n(nats per token)",
    "kl": "KL divergence from the\nfull network (nats per token)",
}


class DepthCurves(NamedTuple):
    """A metric of the network without some layers."""

    metric: str
    baseline: float
    """Value with all layers."""
    blocks: Mapping[int, Mapping[int, float]]
    """Layers in a block -> the block's last layer, counted from 1 -> value."""
    one_by_one: Sequence[float] = ()
    """Values after removing one, two, ... layers greedily; they need not be neighbours."""


def depth_curves(depth: DepthCurves | None, path: Path) -> Path | None:
    """Plot the metric against the last layer of the block that is left out, one curve per block length.

    Horizontal lines: the full network, and the same number of layers as a curve's blocks removed one by one.
    """
    if depth is None or not depth.blocks:
        return None
    colours = dict(zip(sorted(depth.blocks), COLOURS * 9, strict=False))
    with new_figure(path, 9.0, 4.0) as figure:
        axes = figure.subplots()
        axes.set(title="Importance of blocks of layers", ylabel=NAMES.get(depth.metric, depth.metric))
        for length, by_last in sorted(depth.blocks.items()):
            last, values = zip(*sorted(by_last.items()), strict=True)
            label = numbers.counted(length, "layer")
            axes.plot(last, values, "o-", markersize=3.5, color=colours[length], label=label)
        _levels(axes, depth, colours)
        count_axis(axes, "last layer of the block (the first layer is 1)")
        axes.margins(x=0.02)
        legend_outside(axes)
    return path


def _levels(axes: Axes, depth: DepthCurves, colours: Mapping[int, str]) -> None:
    """Draw dashed lines for layers removed one by one, at the curves' block lengths and at the last removal."""
    taken = len(depth.one_by_one)
    for count in sorted({*depth.blocks, taken}):
        if 1 < count <= taken:
            value = depth.one_by_one[count - 1]
            label = f"{numbers.counted(count, 'layer')} one by one: {numbers.loss(value)}"
            axes.axhline(value, color=colours.get(count, GREY), linewidth=1.4, linestyle="--", label=label)
    label = f"all layers: {numbers.loss(depth.baseline)}"
    axes.axhline(depth.baseline, color=GREY, linewidth=1.2, linestyle=":", label=label)
