"""Plots of a rehearsal: bytes alive over modelled time, and modelled time by line of code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import write_json
from .charts import CHARTS, Chart
from .style import ALARM, COLOURS, legend_outside, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["memory_over_time", "time_by_line"]

GIB = 2**30
COLLECTIVE = " in "
ROOT = "all"
FORWARD, BACKWARD, COMMUNICATION = "forward and optimizer", "backward", "communication"
NAMED, LETTERS = 0.06, 150
"""Share of the width from which a block has its name on it, and letters across the whole width."""
Node = tuple[str, ...]
"""Path of a block: kind of work, file, line."""


def memory_over_time(ranks: Sequence[Mapping[str, Any]], memory: float, path: Path) -> Path | None:
    """Plot the bytes alive on each kind of rank over the last step that was rehearsed, and a GPU's memory in GiB."""
    drawn = [rank for rank in ranks if rank["bytes_over_seconds"]]
    if not drawn:
        return None
    with new_figure(path, 9.5, 3.6) as figure:
        axes = figure.subplots()
        for number, rank in enumerate(drawn):
            seconds, sizes = zip(*rank["bytes_over_seconds"], strict=True)
            colour = COLOURS[number % len(COLOURS)]
            style = "--" if number % 2 else "-"  # ranks that are alike lie on each other
            axes.plot(seconds, [size / GIB for size in sizes], style, color=colour, label=rank["kind"])
        highest = max(size / GIB for rank in drawn for _, size in rank["bytes_over_seconds"])
        if memory < 4 * highest:  # else the line would flatten all others
            axes.axhline(memory, linestyle="--", linewidth=1.2, color=ALARM, label="a GPU's memory")
        axes.set(title="Memory over time", xlabel="modelled seconds", ylabel="GiB")
        axes.set_ylim(bottom=0)
        legend_outside(axes)
    return path


def time_by_line(seconds_by_line: Mapping[str, float], path: Path) -> Path | None:
    """Plot the modelled seconds as nested blocks: kind of work, file, line; the widest ones first."""
    seconds = {_node(line): spent for line, spent in seconds_by_line.items() if spent > 0}
    if not seconds:
        return None
    with new_figure(path, 9.5, 3.6) as figure:
        axes = figure.subplots()
        total = sum(seconds.values())
        for depth in range(3):
            _level(axes, seconds, depth, total)
        axes.set(title="Time by line of code", xlabel="modelled seconds", yticks=[0, -1, -2])
        axes.set_yticklabels(["work", "file", "line"])
        axes.set_xlim(0, total)
        axes.grid(visible=False)
    write_json(path.with_suffix(CHARTS), [_chart(seconds)])
    return path


def _node(line: str) -> Node:
    """Return the path of a line of a rehearsal's `seconds_by_line`."""
    name, _, place = line.rpartition(", ")
    work = COMMUNICATION if COLLECTIVE in name else BACKWARD if line.startswith("backward of ") else FORWARD
    file = place.removeprefix("backward of ").partition(" < ")[0].rpartition(":")[0]
    return work, file or "torch", line


def _level(axes: Axes, seconds: Mapping[Node, float], depth: int, total: float) -> None:
    """Draw the blocks of one depth, in the order of their parents."""
    colours = dict(zip((FORWARD, BACKWARD, COMMUNICATION), COLOURS, strict=False))
    start = 0.0
    for node, width in _sorted(seconds, depth):
        colour = colours[node[0]]
        axes.broken_barh([(start, width)], (-depth - 0.48, 0.96), facecolor=colour, edgecolor="white", linewidth=0.4)
        if width > NAMED * total:
            name = node[-1].partition(" < ")[0].rpartition("/")[2][: int(LETTERS * width / total)]
            axes.text(start + width / 2, -depth, name, ha="center", va="center", color="white", fontsize=7)
        start += width


def _sorted(seconds: Mapping[Node, float], depth: int) -> list[tuple[Node, float]]:
    """Return the blocks of one depth with their seconds, each beside its siblings, the longest first."""
    sums: dict[Node, float] = {}
    for node, spent in seconds.items():
        for upto in range(1, 4):
            sums[node[:upto]] = sums.get(node[:upto], 0.0) + spent
    level = [node for node in sums if len(node) == depth + 1]
    order = sorted(level, key=lambda node: [(-sums[node[:upto]], node[upto - 1]) for upto in range(1, depth + 2)])
    return [(node, sums[node]) for node in order]


def _chart(seconds: Mapping[Node, float]) -> Chart:
    """Return the blocks for a browser, which opens the one that is clicked."""
    nodes = list(dict.fromkeys(node[:upto] for node in seconds for upto in range(1, 4)))
    return {
        "title": "Time by line of code, modelled seconds",
        "data": [
            {
                "type": "icicle",
                "ids": [ROOT, *("\t".join(node) for node in nodes)],
                "labels": [ROOT, *(escape(node[-1], quote=False) for node in nodes)],
                "parents": ["", *("\t".join(node[:-1]) or ROOT for node in nodes)],
                "values": [0, *(seconds[node] if len(node) == 3 else 0 for node in nodes)],
                "branchvalues": "remainder",
                "hovertemplate": "%{label}<br>%{value:.4g} s<extra></extra>",
            }
        ],
        "layout": {"xaxis": {}, "yaxis": {}, "annotations": []},
    }
