"""Plots of several runs: the students' losses against their sizes, and their curves in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .style import COLOURS, GREY, count_axis, legend_outside, new_figure

__all__ = ["overlaid", "sizes"]

Line = Mapping[str, Any]
TRAINS = ("distill", "align")
"""Beginnings of the stages that train the student."""


def sizes(students: Mapping[str, Line], teachers: Sequence[float], path: Path) -> Path | None:
    """Plot the loss of each run's student against its parameters; a dashed line for each teacher's loss.

    students: run -> row of its summary.
    """
    found = {
        name: (row["parameters"], row["loss_nats_per_token"])
        for name, row in students.items()
        if row.get("parameters") is not None and row.get("loss_nats_per_token") is not None
    }
    if not found:
        return None
    with new_figure(path, 9.0, 3.6) as figure:
        axes = figure.subplots()
        for (name, point), colour in zip(found.items(), COLOURS * len(found), strict=False):
            axes.plot(*point, "o", markersize=7, color=colour, label=name)
        for loss in teachers:
            axes.axhline(loss, color=GREY, linewidth=1.2, linestyle="--")
        axes.set(title="Loss against size", ylabel="cross-entropy (nats per token)")
        count_axis(axes, "parameters of the student")
        axes.margins(0.15)
        legend_outside(axes)
    return path


def overlaid(runs: Mapping[str, Sequence[Line]], path: Path) -> Path | None:
    """Plot the validation loss of each run's student against the tokens of its stage. runs: run -> its metrics."""
    curves = {
        name: [
            (line["tokens"], line["validation_loss"])
            for line in lines
            if line["stage"].startswith(TRAINS) and line.get("validation_loss") is not None and "tokens" in line
        ]
        for name, lines in runs.items()
    }
    if not any(curves.values()):
        return None
    with new_figure(path, 9.0, 3.6) as figure:
        axes = figure.subplots()
        for (name, points), colour in zip(curves.items(), COLOURS * len(curves), strict=False):
            if points:
                axes.plot(*zip(*points, strict=True), "o-", markersize=3.5, color=colour, label=name)
        axes.set(title="Validation loss in training", ylabel="cross-entropy (nats per token)")
        count_axis(axes, "tokens seen in training")
        axes.set_xlim(left=0)
        legend_outside(axes)
    return path
