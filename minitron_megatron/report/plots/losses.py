"""Plots of losses during training, and of the models' validation losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ... import numbers
from .style import COLOURS, GREY, count_axis, legend_outside, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["bars", "loss_curves"]

DISTILLED = ("distill", "baseline")
"""Stages whose training loss compares with the teacher, not with the text."""
CANDIDATES = "light"
"""Label of the light distillation of a search: many candidates, whose curves `search_ranks` shows one by one."""

Line = Mapping[str, Any]
"""A line of metrics, or a row of the summary."""
Points = list[tuple[float, float]]


class Panel(NamedTuple):
    """A kind of loss: panel title, axis label, key of the metric, and the lines that may have it."""

    title: str
    name: str
    key: str
    lines: Sequence[Line]

    def stages(self, unit: str) -> dict[str, Points]:
        """Return stage -> curve over `unit`, a key of the lines."""
        points: dict[str, Points] = {}
        for line in self.lines:
            if line.get(self.key) is not None:
                points.setdefault(line["stage"], []).append((line[unit], line[self.key]))
        return points


def loss_curves(metrics: Sequence[Line], summary: Sequence[Line], path: Path) -> Path | None:
    """Plot training and validation losses against tokens, one panel per kind of loss.

    The summary's first model, the teacher, is a dashed line in the validation panel. A search's candidates are left
    out, since `search_ranks` shows them, and so are rounds on pairs (`preference_curves`).
    """
    panels = [panel for panel in _panels(metrics) if panel.stages("done")]
    if not panels:
        return None
    measured = [line for panel in panels for line in panel.lines if panel.key in line]
    unit = "tokens" if all("tokens" in line for line in measured) else "done"
    colours = dict(zip(dict.fromkeys(line["stage"] for line in measured), COLOURS * 9, strict=False))
    with new_figure(path, 9.0, 2.7 * len(panels) + 0.3) as figure:
        column = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, panel in zip(column, panels, strict=True):
            axes.set(title=panel.title, ylabel=f"{panel.name}\n(nats per token)")
            if panel.key.startswith("validation"):
                _validation(axes, panel.stages(unit), colours)
                if panel.key == "validation_loss":
                    _reference(axes, summary)
            else:
                _training(axes, panel.stages(unit), colours)
            legend_outside(axes)
        count_axis(column[-1], {"tokens": "tokens seen in training", "done": "steps"}[unit])
        column[-1].set_xlim(left=0)
    return path


def _panels(metrics: Sequence[Line]) -> list[Panel]:
    """Return the panels; a line with a learning rate belongs to training."""
    metrics = [line for line in metrics if line["stage"] != CANDIDATES and "pairs" not in line]
    training = [line for line in metrics if "loss" in line and "lr" in line]
    distilled = [line for line in training if _is_taught(line)]
    plain = [line for line in training if not _is_taught(line)]
    return [
        Panel("Training loss on text", "cross-entropy", "loss", plain),
        Panel("Distillation loss", "the recipe's loss", "loss", distilled),
        Panel("Validation loss", "cross-entropy", "validation_loss", metrics),
        Panel("Validation: KL from the teacher", "KL divergence", "validation_kl", metrics),
    ]


def _is_taught(line: Line) -> bool:
    """Return whether a training loss compares with a teacher; one that does not count FLOPs runs beside none."""
    return line["stage"] in DISTILLED or "teacher_tflops" in line


def _smooth(values: Sequence[float]) -> list[float]:
    """Return a running mean over a window of a tenth of the curve, narrower at the ends."""
    sums = [0.0, *accumulate(values)]
    reach = len(values) // 20
    spans = [(max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]


def _training(axes: Axes, stages: Mapping[str, Points], colours: Mapping[str, str]) -> None:
    """Draw smoothed curves over faint raw ones; the y range follows the smoothed ones."""
    drawn: list[float] = []
    for stage, points in stages.items():
        x, raw = zip(*points, strict=True)
        smooth = _smooth(raw)
        axes.plot(x, raw, color=colours[stage], alpha=0.25, linewidth=0.8)
        axes.plot(x, smooth, color=colours[stage], label=f"{stage}: {numbers.loss(smooth[-1])} at the end")
        drawn += smooth
    _view(axes, drawn)


def _validation(axes: Axes, stages: Mapping[str, Points], colours: Mapping[str, str]) -> None:
    for stage, points in stages.items():
        x, y = zip(*points, strict=True)
        axes.plot(x, y, "o-", markersize=3.5, color=colours[stage], label=f"{stage}: {numbers.loss(y[-1])} at the end")
    _view(axes, [loss for points in stages.values() for _, loss in points])


def _view(axes: Axes, values: Sequence[float]) -> None:
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.05
    axes.set_ylim(low - room, high + room)


def _reference(axes: Axes, summary: Sequence[Line]) -> None:
    """Draw a dashed line for the summary's first model, the teacher, and widen the y range to include it."""
    teacher = summary[0] if summary else {}
    loss = teacher.get("loss_nats_per_token")
    if loss is not None and math.isfinite(loss):
        low, high = axes.get_ylim()
        room = 0.06 * (high - low)
        axes.set_ylim(min(low, loss - room), max(high, loss + room))
        name = f"{teacher.get('model', 'teacher')}: {numbers.loss(loss)}"
        axes.axhline(loss, color=GREY, linewidth=1.2, linestyle="--", label=name)


def bars(summary: Sequence[Line], path: Path) -> Path | None:
    """Plot the models' validation losses as bars from zero, each with its perplexity."""
    rows = [row for row in summary if _finite(row.get("loss_nats_per_token"))]
    if not rows:
        return None
    losses = [row["loss_nats_per_token"] for row in rows]
    names = [_named(row) for row in rows]
    with new_figure(path, 9.0, 1.5 + 0.5 * len(rows)) as figure:
        axes = figure.subplots()
        axes.barh(range(len(rows)), losses, color=COLOURS[0], height=0.62)
        for place, loss in enumerate(losses):
            text = f" {numbers.loss(loss)}  (perplexity {numbers.perplexity(_exp(loss))})"
            axes.text(loss, place, text, va="center", fontsize=9)
        axes.set(title="Validation loss of the models", xlabel="cross-entropy (nats per token)")
        axes.set_yticks(range(len(rows)), names)
        axes.set_xlim(0, 1.4 * max(losses))
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
    return path


def _named(row: Line) -> str:
    size = row.get("parameters")
    return str(row.get("model", "?")) + (f"\n{numbers.count(size)} parameters" if size is not None else "")


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
