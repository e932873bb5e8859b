"""Plot of preference optimisation: losses, accuracy, margins and the distance from the reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import numbers
from .style import COLOURS, count_axis, legend_outside, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["preference_curves"]

Line = Mapping[str, Any]
PANELS = {
    "loss": ("Loss of the round", "loss per pair"),
    "preference_accuracy": ("Share of pairs whose chosen response gained more", "accuracy"),
    "preference_margin": ("Margin between chosen and rejected responses", "beta x gap (nats)"),
    "kl_to_reference": ("Distance from the start of the round", "KL (nats per response)"),
}
"""Metric -> title and axis label of its panel. Each has a counterpart on held-out pairs, `validation_...`."""


def preference_curves(metrics: Sequence[Line], path: Path) -> Path | None:
    """Plot the rounds that train on pairs against the pairs seen: training as a line, held-out pairs as dots."""
    lines = [line for line in metrics if line.get("pairs") is not None]
    stages = sorted({line["stage"] for line in lines}, key=lambda stage: (len(stage), stage))
    if not stages:
        return None
    with new_figure(path, 9.0, 2.3 * len(PANELS) + 0.3) as figure:
        column = figure.subplots(len(PANELS), 1, sharex=True)
        for axes, (key, (title, label)) in zip(column, PANELS.items(), strict=True):
            axes.set(title=title, ylabel=label)
            for stage, colour in zip(stages, COLOURS * len(stages), strict=False):
                own = [line for line in lines if line["stage"] == stage]
                _draw(axes, own, key, stage, colour)
            legend_outside(axes)
        count_axis(column[-1], "pairs seen in training")
        column[-1].set_xlim(left=0)
    return path


def _draw(axes: Axes, lines: Sequence[Line], key: str, stage: str, colour: str) -> None:
    trained = [(line["pairs"], line[key]) for line in lines if line.get(key) is not None]
    measured = f"validation_{key}"
    held_out = [(line["pairs"], line[measured]) for line in lines if line.get(measured) is not None]
    if trained:
        axes.plot(*zip(*trained, strict=True), color=colour, alpha=0.4, linewidth=0.9)
    if held_out:
        told = f"{stage}, held out: {numbers.loss(held_out[-1][1])} at the end"
        axes.plot(*zip(*held_out, strict=True), "o-", markersize=3.5, color=colour, label=told)
