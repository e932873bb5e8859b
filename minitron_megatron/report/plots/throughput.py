"""Plot of the student's serving throughput relative to the teacher's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .style import COLOURS, GREY, legend_outside, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BenchRow", "plot_bench"]

BAR = 0.4
"""Width of a bar; neighbouring ticks are 1 apart."""
BenchRow = Mapping[str, Any]
"""Row of `bench/table.json`: `inputs`, `outputs`, `batch`, the ratios, and each model's measurements by its name."""

PAPER = {"depth-pruned": 2.7, "width-pruned": 1.8, "FP8 over BF16": 1.4}
"""Ratios of the paper: Llama-3.1-Minitron-4B over Llama 3.1 8B, TensorRT-LLM on one H100 ([B] section 4)."""


def plot_bench(rows: Sequence[BenchRow], path: Path, *, paper: bool) -> Path | None:
    """Plot the ratio of tokens per second, student over teacher, one bar per (input, output) size.

    There is a panel for each batch size, and one for the student's largest batch over the teacher's smallest, as the
    second paper compares. A line at 1 stands for the teacher. paper: add the second paper's ratios as dashed lines,
    for measurements with the same engine, TensorRT-LLM.
    """
    panels = [panel for panel in _panels(rows) if panel[2]]
    if not panels:
        return None
    with new_figure(path, 9.5, 1.4 + 2.2 * len(panels)) as figure:
        every = figure.subplots(len(panels), sharex=False, squeeze=False)[:, 0]
        for axes, (title, ending, kept) in zip(every, panels, strict=True):
            _bars(axes, kept, ending)
            axes.axhline(1.0, linewidth=1.2, color=GREY, label="teacher")
            if paper:
                _paper(axes)
            axes.set(title=title, ylabel="tokens per second\nover the teacher's", xlabel="input / output tokens")
        legend_outside(every[0])
    return path


def _panels(rows: Sequence[BenchRow]) -> list[tuple[str, str, list[BenchRow]]]:
    """Return (title, suffix of the ratio keys, rows that have such a ratio) of each panel."""
    batches = sorted({row["batch"] for row in rows})
    wanted = [(f"Both at batch {batch}", "", [row for row in rows if row["batch"] == batch]) for batch in batches]
    if len(batches) > 1:
        wanted.append((f"Student at batch {batches[-1]}, teacher at {batches[0]}", "_batches", list(rows)))
    keys = [(f"ratio{ending}", f"ratio{ending}_fp8") for _, ending, _ in wanted]
    return [
        (title, ending, [row for row in of_panel if any(key in row for key in pair)])
        for (title, ending, of_panel), pair in zip(wanted, keys, strict=True)
    ]


def _bars(axes: Axes, rows: Sequence[BenchRow], ending: str) -> None:
    """Draw the bars of each row side by side, centred on its tick."""
    kinds = {"student": f"ratio{ending}", "student, FP8": f"ratio{ending}_fp8"}
    drawn = {label: key for label, key in kinds.items() if any(key in row for row in rows)}
    for number, (label, key) in enumerate(drawn.items()):
        bars = [(at + BAR * (number - (len(drawn) - 1) / 2), row[key]) for at, row in enumerate(rows) if key in row]
        places, ratios = zip(*bars, strict=True)
        axes.bar(places, ratios, BAR, color=COLOURS[number], label=label)
    axes.set_xticks(range(len(rows)), [f"{row['inputs']} / {row['outputs']}" for row in rows], fontsize=8)
    axes.set_xlim(-0.6, len(rows) - 0.4)


def _paper(axes: Axes) -> None:
    for (name, ratio), colour in zip(PAPER.items(), COLOURS[2:], strict=False):
        label = f"paper, Llama 3.1 8B on an H100:\n{name}, {ratio}x"
        axes.axhline(ratio, linestyle="--", linewidth=1, color=colour, label=label)
