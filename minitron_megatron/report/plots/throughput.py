"""How much faster the student serves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .style import COLOURS, new_figure

__all__ = ["plot_bench"]

PAPER = {"depth-pruned 4B (2.7x)": 2.7, "width-pruned 4B (1.8x)": 1.8, "FP8 over BF16 (1.4x)": 1.4}
"""Of Llama-3.1-Minitron-4B over Llama 3.1 8B, TensorRT-LLM on one H100 ([B] section 4)."""


def plot_bench(rows: Sequence[Mapping[str, Any]], path: Path) -> Path | None:
    """The ratio of tokens a second, student over teacher, a bar a rung, with the second paper's as lines."""
    kept = [row for row in rows if "ratio" in row or "ratio_fp8" in row]
    if not kept:
        return None
    with new_figure(path, 9.0, 4.5) as figure:
        axes = figure.subplots()
        for number, (key, label) in enumerate((("ratio", "student"), ("ratio_fp8", "student, FP8"))):
            bars = [(at, row[key]) for at, row in enumerate(kept) if key in row]
            if bars:
                places, values = zip(*bars, strict=True)
                axes.bar([at + 0.4 * number for at in places], values, 0.4, color=COLOURS[number], label=label)
        for number, (label, ratio) in enumerate(PAPER.items()):
            axes.axhline(ratio, linestyle="--", linewidth=1, color=COLOURS[(number + 2) % len(COLOURS)], label=label)
        names = [f"{row['inputs']}/{row['outputs']}\nbatch {row['batch']}" for row in kept]
        axes.set_xticks(range(len(kept)), names, fontsize=8)
        axes.set(title="Throughput over the teacher's", ylabel="ratio of tokens a second")
        axes.legend(fontsize=8)
    return path
