"""Plot of a study: every measure of every arm, and the validation curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .style import COLOURS, GREY, count_axis, legend_outside, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_study"]

Arms = Sequence[Mapping[str, Any]]


def plot_study(table: Mapping[str, Any], path: Path) -> Path:
    """Plot a panel per measure, with a dot per seed and a bar at their mean; below, validation loss over the steps."""
    arms, measures = table["arms"], table["measures"]
    curves = [arm for arm in arms if len(arm["curve"]) > 1]
    tall = 1.2 + 0.34 * len(arms)
    with new_figure(path, 9.0, tall * len(measures) + (3.4 if curves else 0.0)) as figure:
        heights = [tall] * len(measures) + ([3.4] if curves else [])
        column = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, (name, about) in zip(column, measures.items(), strict=False):
            _dots(axes, name, arms)
            axes.set(title=table["title"] if axes is column[0] else name, xlabel=about)
        if curves:
            _curves(column[-1], curves)
    return path


def _dots(axes: Axes, name: str, arms: Arms) -> None:
    for place, arm in enumerate(arms):
        found = arm["measures"][name]
        values = [value for value in found["values"] if value is not None]
        axes.plot(values, [place] * len(values), "o", markersize=4, color=COLOURS[0], alpha=0.6)
        if found["mean"] is not None:
            axes.plot(found["mean"], place, "|", markersize=14, markeredgewidth=2.2, color=COLOURS[1])
    base = arms[0]["measures"][name]["mean"]
    if base is not None:
        axes.axvline(base, color=GREY, linewidth=1.0, linestyle="--")
    axes.set_yticks(range(len(arms)), [arm["arm"] for arm in arms])
    axes.set_ylim(len(arms) - 0.5, -0.5)


def _curves(axes: Axes, arms: Arms) -> None:
    for place, arm in enumerate(arms):
        style = ("-", "--", ":")[place // len(COLOURS) % 3]
        line = dict(sorted((int(step), loss) for step, loss in arm["curve"].items()))
        colour = COLOURS[place % len(COLOURS)]
        axes.plot(list(line), list(line.values()), style, marker=".", color=colour, label=arm["arm"])
    axes.set(title="During training", ylabel="validation loss (nats per token)")
    count_axis(axes, "steps")
    legend_outside(axes)
