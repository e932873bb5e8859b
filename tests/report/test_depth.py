"""The depth plot, its place in the report, and the description of depth scores by `show`."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from minitron_megatron.errors import CheckpointError
from minitron_megatron.layout import Shape
from minitron_megatron.records import DepthScores
from minitron_megatron.report import describe, plots, report_run
from minitron_megatron.report.page import CAPTIONS

SHAPE = Shape(layers=4, hidden=8, ffn=6, heads=4, kv_groups=2, head_dim=2, vocab=11)
BLOCKS = {(0, 1): 9.0, (1, 1): 3.0, (2, 1): 2.5, (3, 1): 4.0, (0, 2): 9.5, (1, 2): 3.75, (2, 2): 5.0}
DEPTH = DepthScores(SHAPE, "loss", True, 2.0, BLOCKS, ((2, 2.5), (1, 3.5), (3, 6.0)), 12, 34567, "abc")


def run_folder(folder: Path, depth: DepthScores = DEPTH) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text("score:\n  samples: 12\n")
    depth.save(folder / "scores" / "depth.json")
    return folder


def curves(figure: Any) -> dict[str, tuple[list[float], list[float]]]:
    (axes,) = figure.axes
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}


def test_curves_stand_over_the_last_layer_and_levels_over_all(figures: list[Any], tmp_path: Path) -> None:
    report_run(run_folder(tmp_path / "run"))
    (figure,) = figures
    shown = curves(figure)
    assert shown["1 layer"] == ([1, 2, 3, 4], [9.0, 3.0, 2.5, 4.0])
    assert shown["2 layers"] == ([2, 3, 4], [9.5, 3.75, 5.0])
    levels = {label: y for label, (_, y) in list(shown.items())[2:]}
    assert levels == {
        "2 layers one by one: 3.5000": [3.5, 3.5],
        "3 layers one by one: 6.0000": [6.0, 6.0],
        "all layers: 2.0000": [2.0, 2.0],
    }
    (axes,) = figure.axes
    styles = {line.get_label(): (line.get_linestyle(), line.get_color()) for line in axes.lines}
    assert styles["2 layers one by one: 3.5000"] == ("--", styles["2 layers"][1])
    assert axes.get_ylabel() == "cross-entropy\n(nats per token)"
    assert axes.get_xlabel() == "last layer of the block (the first layer is 1)"


@pytest.mark.parametrize(("metric", "name"), [("kl", "KL divergence"), ("bi", "block importance"), ("piqa", "piqa")])
def test_the_metric_is_named(figures: list[Any], tmp_path: Path, metric: str, name: str) -> None:
    plots.depth_curves(plots.DepthCurves(metric, 0.0, {1: {1: 0.5}}), tmp_path / "depth.png")
    assert name in figures[0].axes[0].get_ylabel()
    assert set(curves(figures[0])) == {"1 layer", "all layers: 0.0000"}


def test_nothing_measured_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "plots" / "depth.png"
    assert plots.depth_curves(None, path) is None
    assert plots.depth_curves(plots.DepthCurves("loss", 2.0, {}), path) is None
    assert not path.parent.exists()


def test_the_page_holds_the_plot_where_a_run_has_depth_scores(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    assert escape(CAPTIONS["depth"]) in report_run(run).read_text()
    assert (run / "plots" / "depth.png").stat().st_size > 10_000
    (run / "scores" / "depth.json").unlink()
    assert escape(CAPTIONS["depth"]) not in report_run(run).read_text()


def test_show_names_the_best_block_of_each_length(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run")
    console = Console(width=100)
    with console.capture() as capture:
        console.print(describe(run / "scores" / "depth.json"))
    text = capture.get()
    for row in (
        ("metric", "loss"),
        ("all layers", "2.0000"),
        ("tokens", "34,567"),
        ("without 1", "2.5000 (layers 2 to 2)"),
        ("without 2", "3.7500 (layers 1 to 2)"),
        ("one by one", "2, 1, 3"),
    ):
        assert any(line.strip().startswith(row[0]) and line.strip().endswith(row[1]) for line in text.splitlines()), row
    (run / "scores" / "depth.json").write_text("{}")
    with pytest.raises(CheckpointError, match="holds no depth scores"):
        describe(run / "scores" / "depth.json")
