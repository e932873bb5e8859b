"""Text curves of scores, and shares that each cut keeps, compared with values computed by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from minitron_megatron.layout import Shape
from minitron_megatron.records import Plan, Scores, Statistic
from minitron_megatron.report import describe, plots
from minitron_megatron.report.importance import CUT, KEPT, SCORED, cut_rows, kept_rows, score_rows, shares

SCORES: dict[str, dict[int | None, list[float]]] = {
    "ffn": {0: [4.0, 3.0, 2.0, 1.0], 1: [1.0, 1.0, 1.0, 1.0], 2: [9.0, 0.0, 0.0, 1.0]},
    "hidden": {None: [1.0, 3.0]},
}
PLAN = {"ffn": {0: (0, 1), 2: (0, 3)}, "hidden": {None: (1,)}, "layers": {None: (0, 2)}}
MARGINS = {"ffn": {0: 0.5, 2: float("inf")}, "hidden": {None: 2 / 3}}


def test_the_share_of_the_score_that_stays() -> None:
    assert shares(PLAN, SCORES) == {"ffn": {0: 0.7, 2: 1.0}, "hidden": {None: 0.75}}
    assert kept_rows(PLAN, SCORES, MARGINS) == [
        ("ffn", "2", "4", "70.0% to 100.0%", "5.0e-01"),
        ("hidden", "1", "2", "75.0%", "6.7e-01"),
        ("layers", "2", "-", "-", "-"),
    ]
    assert cut_rows(PLAN, SCORES, MARGINS) == [
        ("ffn", "0", "2", "4", "70.0%", "5.0e-01"),
        ("ffn", "2", "2", "4", "100.0%", "-"),
        ("hidden", "all", "1", "2", "75.0%", "6.7e-01"),
        ("layers", "all", "2", "-", "-", "-"),
    ]
    assert (len(KEPT), len(CUT)) == (5, 6)


def test_units_that_never_fired_have_no_share() -> None:
    assert kept_rows({"ffn": {0: (0,)}}, {"ffn": {0: [0.0, 0.0]}}, {}) == [("ffn", "1", "2", "-", "-")]
    assert kept_rows({"kv_groups": {0: (0,)}}, {}, {})[0][2:4] == ("-", "-")


def test_curves_fall_from_the_best_to_the_least() -> None:
    long = {"ffn": {0: [float(unit) for unit in range(1000)]}}
    [row] = score_rows(long)
    assert len(row) == len(SCORED)
    assert row[:6] == ("ffn", "0", "1,000", "999", "500", "0.00")
    assert len(row[6]) == 24 and row[6][0] == "█" and row[6][-1] == " " and row[6] == "".join(sorted(row[6]))[::-1]
    assert score_rows(SCORES)[0] == ("ffn", "0", "4", "4.00", "2.50", "1.00", "█▆▄▂")
    assert score_rows(SCORES)[3] == ("hidden", "all", "2", "3.00", "2.00", "1.00", "█▃")
    assert score_rows({"ffn": {0: [0.0]}, "heads": {0: []}}) == [
        ("ffn", "0", "1", "0.00", "0.00", "0.00", ""),
        ("heads", "0", "0", "-", "-", "-", ""),
    ]


def test_the_plot_of_shares_has_each_cut(figures: list[Any], tmp_path: Path) -> None:
    assert plots.shares({}, tmp_path / "no.png") is None and plots.shares({"ffn": {}}, tmp_path / "no.png") is None
    assert plots.shares(shares(PLAN, SCORES), tmp_path / "shares.png")
    [axes] = figures[0].axes
    ffn, hidden = axes.lines
    assert (list(ffn.get_xdata()), list(ffn.get_ydata())) == ([0, 2], [0.7, 1.0])
    assert (ffn.get_label(), hidden.get_label(), list(hidden.get_ydata())) == ("ffn", "hidden", [0.75])
    assert hidden.get_xdata()[0] < 0 and "shared" in [label.get_text() for label in axes.get_xticklabels()]


def said(path: Path) -> list[list[str]]:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(describe(path))
    return [line.split() for line in capture.get().splitlines()]


def test_show_draws_scores_and_what_a_plan_kept_of_them(tmp_path: Path) -> None:
    shape = Shape(layers=3, hidden=2, ffn=4, heads=2, kv_groups=2, head_dim=2, vocab=11)
    values = {axis: {layer: torch.tensor(v).double() for layer, v in by.items()} for axis, by in SCORES.items()}
    Scores(values, shape, Statistic(), 2, 34, "abc").save(tmp_path / "scores" / "scores.safetensors")
    keep = {axis: by for axis, by in PLAN.items() if axis != "layers"}
    Plan(shape, keep, (0, 2), MARGINS, "abc").save(tmp_path / "pruned" / "plan.json")
    assert ["ffn", "0", "4", "4.00", "2.50", "1.00", "█▆▄▂"] in said(tmp_path / "scores")
    assert ["ffn", "0", "2", "4", "70.0%", "5.0e-01"] in said(tmp_path / "pruned" / "plan.json")
    Scores(values, shape.resized(hidden=4), Statistic(), 2, 34, "abc").save(tmp_path / "scores" / "scores.safetensors")
    assert ["ffn", "0", "2", "4", "-", "5.0e-01"] in said(tmp_path / "pruned"), "scores of another model say nothing"
