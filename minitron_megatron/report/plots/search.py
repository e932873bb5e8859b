"""Plots of a search: loss against cost, and ranks during light distillation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ... import numbers
from ..searched import SearchedCandidate, SearchTable
from .style import COLOURS, PALE, count_axis, legend_outside, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["search_front", "search_ranks"]

COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "params": ("parameters", numbers.count),
    "active_params": ("active parameters", numbers.count),
    "memory_bytes": ("memory of weights and KV cache", numbers.size),
    "flops_per_token": ("compute per token", numbers.flops),
    "decode_ms": ("time of a decoding step (ms)", "{:g}".format),
    "tokens_per_second": ("tokens per second", numbers.count),
}
"""Cost -> (axis label, formatter of its ticks)."""
MOST_NAMED = len(COLOURS)


def search_front(table: SearchTable | None, path: Path) -> Path | None:
    """Plot loss against the first budgeted cost, right after pruning and, if any was distilled, after distillation.

    Each candidate is a point; Pareto-optimal ones are joined by a line; the winner is a star.
    """
    rows = [row for row in (table["candidates"] if table else ()) if row["after_cut"] is not None]
    if not table or not rows:
        return None
    cost, trained = table["costs"][0], [row for row in rows if _reached(row, rows)]
    panels: list[tuple[str, list[SearchedCandidate], Literal["after_cut", "loss"]]]
    panels = [("Right after pruning", rows, "after_cut"), ("After light distillation", trained, "loss")]
    panels = panels if trained else panels[:1]
    with new_figure(path, 9.0, 3.6) as figure:
        for axes, (title, shown, key) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            axes.set(title=title, ylabel="loss (nats per token)")
            others = [row for row in shown if not row["front"] and not row["winner"]]
            axes.plot(*_points(others, cost, key), "o", color=PALE, markersize=4, label="other candidates")
            if key == "loss" or not trained:
                best = sorted((row for row in shown if row["front"]), key=lambda row: row["costs"][cost])
                axes.plot(*_points(best, cost, key), "o-", color=COLOURS[0], markersize=4, label="Pareto-optimal")
            chosen = [row for row in shown if row["winner"]]
            axes.plot(*_points(chosen, cost, key), "*", color=COLOURS[1], markersize=13, label="winner")
            name, write = COSTS[cost]
            if write is numbers.count:
                count_axis(axes, name)
            else:
                axes.set_xlabel(name)
                axes.xaxis.set_major_formatter(lambda value, _, write=write: write(value))
            axes.legend(fontsize=8)
    return path


def _points(
    rows: Sequence[SearchedCandidate], cost: str, key: Literal["after_cut", "loss"]
) -> tuple[list[float], list[float | None]]:
    return [row["costs"][cost] for row in rows], [row[key] for row in rows]


def _reached(row: SearchedCandidate, rows: Sequence[SearchedCandidate]) -> bool:
    """Whether a candidate was distilled to the last step that any candidate reached."""
    last = max((int(step) for each in rows for step in each["curve"]), default=None)
    return last is not None and str(last) in row["curve"]


def search_ranks(table: SearchTable | None, path: Path) -> Path | None:
    """Plot each candidate's held-out loss and rank against steps of light distillation, and the correlation of each
    ranking with the last one (figure 9 of Minitron's first paper).

    Ranks are of the candidates that were distilled to the last step.
    """
    known = [row for row in (table["candidates"] if table else ()) if row["curve"]]
    rows = [row for row in known if _reached(row, known)]
    if not table or len(rows) < 2 or len(rows[0]["curve"]) < 2:
        return None
    steps = sorted(int(step) for step in rows[0]["curve"])
    orders = {step: sorted(rows, key=lambda row: _loss(row, step)) for step in steps}
    height = 0.22 * max(len(rows), 8)
    with new_figure(path, 9.0, 3.4 + 2 * height) as figure:
        losses, ranks, agreement = figure.subplots(3, 1, sharex=True, height_ratios=[3, 3, 1])
        for place, row in reversed([*enumerate(known)]):  # the best lie on top
            named = place < MOST_NAMED
            style = {"markersize": 3.5, "color": COLOURS[place] if named else PALE}
            losses.plot(*_curve(row), "o-", label=row["name"] if named else None, **style)
            if row in rows:
                ranks.plot(steps, [orders[step].index(row) + 1 for step in steps], "o-", **style)
        losses.set(
            title="Loss of the candidates in light distillation", ylabel="held-out cross-entropy\n(nats per token)"
        )
        ranks.set_title("Their ranks")
        count_axis(ranks, "rank by held-out loss", side="y")
        ranks.invert_yaxis()
        legend_outside(losses, reverse=True)
        _agreement(agreement, table["settled"])
    return path


def _curve(row: SearchedCandidate) -> tuple[list[int], list[float]]:
    """Return (steps, losses); a loss that was not finite is a gap."""
    steps = sorted(map(int, row["curve"]))
    return steps, [math.nan if (loss := row["curve"][str(step)]) is None else loss for step in steps]


def _loss(row: SearchedCandidate, step: int) -> float:
    loss = row["curve"][str(step)]
    return float("inf") if loss is None else loss


def _agreement(axes: Axes, settled: Sequence[tuple[int, float | None]]) -> None:
    values = [math.nan if value is None else value for _, value in settled]
    axes.plot([step for step, _ in settled], values, "o-", markersize=3.5, color=COLOURS[0])
    axes.set(title="Agreement of each step's ranking with the last one's", ylabel="correlation\nwith the last")
    axes.set_ylim(top=1.08)
    count_axis(axes, "steps")
