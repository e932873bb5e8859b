"""Plot of the student's serving throughput relative to the teacher's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .style import COLOURS, legend_outside, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BenchRow", "plot_bench"]

BenchRow = Mapping[str, Any]
"""Row of `bench/table.json`: `inputs`, `outputs`, `batch`, the ratios, and each model's measurements by its name."""

PAPER = {"depth-pruned 4B (2.7x)": 2.7, "width-pruned 4B (1.8x)": 1.8, "FP8 over BF16 (1.4x)": 1.4}
"""Ratios of the paper: Llama-3.1-Minitron-4B over Llama 3.1 8B, TensorRT-LLM on one H100 ([B] section 4)."""


def plot_bench(rows: Sequence[BenchRow], path: Path) -> Path | None:
    """Plot the ratio of tokens per second, student over teacher, one bar per (input, output) size.

    There is a panel for each batch size, and one for the student's largest batch over the teacher's smallest, as the
    second paper compares. Dashed lines are the paper's ratios.
    """
    panels = [panel for panel in _panels(rows) if panel[2]]
    if not panels:
        return None
    with new_figure(path, 9.5, 1.4 + 2.2 * len(panels)) as figure:
        every = figure.subplots(len(panels), sharex=False, squeeze=False)[:, 0]
        for axes, (title, ending, kept) in zip(every, panels, strict=True):
            _bars(axes, kept, ending)
            axes.set(title=title, ylabel="tokens per second\nover the teacher's")
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
    for number, (leaf, label) in enumerate((("", "student"), ("_fp8", "student, FP8"))):
        bars = [(at, row[key]) for at, row in enumerate(rows) if (key := f"ratio{ending}{leaf}") in row]
        if bars:
            places, values = zip(*bars, strict=True)
            axes.bar([at + 0.4 * number - 0.2 for at in places], values, 0.4, color=COLOURS[number], label=label)
    for number, (label, ratio) in enumerate(PAPER.items()):
        axes.axhline(ratio, linestyle="--", linewidth=1, color=COLOURS[number + 2], label=label)
    axes.set_xticks(range(len(rows)), [f"{row['inputs']} / {row['outputs']}" for row in rows], fontsize=8)
