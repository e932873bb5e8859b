"""Contents of each plot."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.files import read_json
from minitron_megatron.records import SAFE_MARGIN
from minitron_megatron.report import plots
from minitron_megatron.report.plots.losses import _smooth

LAYERS, FFN, HEADS = 4, 48, 8
PNG = b"\x89PNG\r\n\x1a\n"


def titles(figure: Any) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes if axes.get_title(loc="left")]


def legend(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def shown(line: Any) -> list[float]:
    return [float(y) for y in line.get_ydata()]


def test_matplotlib_is_imported_by_none_of_the_imports() -> None:
    program = "import sys, minitron_megatron.report as r; assert 'matplotlib' not in sys.modules; assert r.write_report"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_nothing_to_show_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "plots" / "it.png"
    assert plots.loss_curves([{"stage": "score", "done": 1, "loss": 2.0}], [], path) is None
    assert plots.loss_curves([{"stage": "correct", "done": 1, "loss": None, "lr": 1.0}], [], path) is None
    assert plots.bars([{"model": "teacher", "loss_nats_per_token": math.nan}], path) is None
    assert plots.importance({"ffn": {0: []}}, {}, path) is None
    assert plots.margins({"ffn": {0: math.inf}}, path) is None
    assert not path.parent.exists()


def test_losses_of_two_kinds_have_two_panels(
    metrics: list[dict[str, Any]], summary: list[dict[str, Any]], figures: list[Any], tmp_path: Path
) -> None:
    path = plots.loss_curves(metrics, summary, tmp_path / "losses.png")
    assert path is not None and path.read_bytes().startswith(PNG)
    plain, distilled, validation = figures[0].axes
    assert [entry.split(":")[0] for entry in legend(plain)] == ["correct"]
    assert {entry.split(":")[0] for entry in legend(distilled)} == {"distill", "baseline"}
    assert legend(validation)[-1] == "teacher: 2.7123"
    assert "cross-entropy" in plain.get_ylabel() and "recipe's loss" in distilled.get_ylabel()
    assert validation.get_xlabel() == "tokens seen in training"
    raw = next(line for line in distilled.lines if line.get_alpha())
    assert shown(raw) == [line["loss"] for line in metrics if line["stage"] == "distill"]
    assert list(raw.get_xdata()) == [4096 * n for n in range(1, 121)]


def test_a_stage_has_one_colour_in_all_panels(
    metrics: list[dict[str, Any]], figures: list[Any], tmp_path: Path
) -> None:
    plots.loss_curves(metrics, [], tmp_path / "losses.png")
    colours: dict[str, set[str]] = {}
    for axes in figures[0].axes:
        for line in axes.lines:
            if ":" in line.get_label():
                colours.setdefault(line.get_label().split(":")[0], set()).add(line.get_color())
    assert {len(of_stage) for of_stage in colours.values()} == {1}
    assert len(set.union(*colours.values())) == 3


def test_without_tokens_losses_stand_over_steps(figures: list[Any], tmp_path: Path) -> None:
    lines = [{"stage": "correct", "done": n, "loss": 3.0 / n, "lr": 1e-4} for n in (1, 2, 3)]
    lines[1]["loss"] = None  # type: ignore[assignment]
    plots.loss_curves(lines, [], tmp_path / "losses.png")
    (axes,) = figures[0].axes
    assert axes.get_xlabel() == "steps"
    assert list(axes.lines[0].get_xdata()) == [1, 3]


@pytest.mark.parametrize("size", [1, 7, 80, 400])
def test_smoothing_is_the_mean_of_a_window(size: int) -> None:
    chance = random.Random(size)
    values = [chance.random() for _ in range(size)]
    reach = size // 20
    for place, smooth in enumerate(_smooth(values)):
        window = values[max(0, place - reach) : place + reach + 1]
        assert smooth == pytest.approx(sum(window) / len(window))


def test_bars_are_the_losses_from_zero(summary: list[dict[str, Any]], figures: list[Any], tmp_path: Path) -> None:
    assert plots.bars([*summary, {"model": "lost", "loss_nats_per_token": None}], tmp_path / "models.png")
    (axes,) = figures[0].axes
    assert [bar.get_width() for bar in axes.patches] == [2.7123, 4.9154, 2.8093]
    assert axes.get_xlim()[0] == 0
    assert "perplexity 16.60" in axes.texts[2].get_text()


def test_curves_are_sorted_and_strong_just_where_units_are_kept(
    scores: Any, plan: Any, figures: list[Any], tmp_path: Path
) -> None:
    assert plots.importance(scores, plan, tmp_path / "importance.png")
    assert titles(figures[0]) == [
        "layers: 3 of 4 kept (pruned: grey)",
        "hidden: 16 of 32 kept",
        "ffn: 24 of 48 kept, 1 layer removed",
        "share of the layer's best (pruned: grey)",
        "heads: 4 of 8 kept, 1 layer removed",
        "share of the layer's best (pruned: grey)",
    ]
    heads = next(axes for axes in figures[0].axes if axes.get_title(loc="left").startswith("heads"))
    for layer in range(LAYERS):
        faint, strong = (shown(line) for line in heads.lines[2 * layer : 2 * layer + 2])
        values = scores["heads"][layer]
        assert faint == sorted(values, reverse=True)
        kept = {values[unit] for unit in plan["heads"].get(layer, [])}
        assert {value for value in strong if not math.isnan(value)} == kept
        assert len(strong) == HEADS


def test_the_edge_of_what_is_kept_is_marked_only_where_all_layers_share_it(
    scores: Any, plan: Any, figures: list[Any], tmp_path: Path
) -> None:
    plots.importance(scores, plan, tmp_path / "importance.png")
    of_axis = {axes.get_title(loc="left").split(":")[0]: axes for axes in figures[0].axes}
    assert list(of_axis["ffn"].lines[-1].get_xdata()) == [FFN // 2 + 0.5] * 2
    assert len(of_axis["heads"].lines) == 2 * LAYERS


def test_the_map_has_each_unit_once_in_colour_or_in_grey(
    scores: Any, plan: Any, figures: list[Any], tmp_path: Path
) -> None:
    plots.importance({"ffn": scores["ffn"]}, plan, tmp_path / "importance.png")
    _, axes, _ = figures[0].axes
    grey, colour = (image.get_array().mask for image in axes.images)
    assert (grey != colour).all()
    assert [(~row).sum() for row in colour] == [FFN // 2, FFN // 2, 0, FFN // 2]


def test_a_log_axis_has_plain_numbers_which_the_browsers_chart_has_too(
    scores: Any, margins: Any, figures: list[Any], tmp_path: Path
) -> None:
    plots.importance(
        {"heads": {layer: [1.5 * 60 ** (at / 7) for at in range(8)] for layer in range(2)}}, {}, tmp_path / "i.png"
    )
    low, high = figures[0].axes[0].get_ylim()
    ticks = [tick.get_text() for tick in figures[0].axes[0].get_yticklabels() if low < tick.get_position()[1] < high]
    assert ticks == ["2", "5", "10", "20", "50", "100"]
    plots.margins(margins, tmp_path / "margins.png")
    (chart,) = read_json(tmp_path / "margins.charts.json")
    texts = chart["layout"]["yaxis"]["ticktext"]
    assert "1e-05" in texts and [float(text) for text in texts] == pytest.approx(chart["layout"]["yaxis"]["tickvals"])


def test_without_a_plan_all_units_are_kept(scores: Any, figures: list[Any], tmp_path: Path) -> None:
    plots.importance({"ffn": scores["ffn"]}, {}, tmp_path / "importance.png")
    assert titles(figures[0])[0] == "ffn: 48 of 48 kept"
    assert len(figures[0].axes[0].lines) == 2 * LAYERS


def test_margins_stand_at_their_layers_and_ties_at_the_edge(margins: Any, figures: list[Any], tmp_path: Path) -> None:
    assert plots.margins(margins, tmp_path / "margins.png")
    (axes,) = figures[0].axes
    line, hidden, ffn, heads = axes.lines
    assert shown(line) == [SAFE_MARGIN] * 2
    assert hidden.get_xdata()[0] < 0
    assert list(ffn.get_xdata()) == [0, 1, 3]
    assert shown(ffn)[:2] == [1e-3, 4.2e-7] and 0 < shown(ffn)[2] < 4.2e-7
    assert list(heads.get_xdata()) == [0, 3]
    assert "shared" in [label.get_text() for label in axes.get_xticklabels()]


def test_candidates_of_a_search_have_a_curve_each_and_none_among_the_training_losses(
    metrics: list[dict[str, Any]], figures: list[Any], tmp_path: Path
) -> None:
    light = {"stage": "light", "loss": 0.5, "validation_loss": 5.0, "lr": 1e-4, "tokens": 128, "unit": "steps"}
    plots.loss_curves(
        [*metrics[-160:-150], *(light | {"done": done} for done in (1, 2, 7))], [], tmp_path / "losses.png"
    )
    assert not [text for axes in figures[0].axes for text in legend(axes) if text.startswith("light")]
    curves = {"a": {"2": 3.0, "4": 2.0}, "b": {"2": 2.5, "4": 2.25}, "halved": {"2": 4.0}}
    table: Any = {
        "candidates": [{"name": name, "costs": {"params": 9}, "curve": curve} for name, curve in curves.items()],
        "settled": [(2, -1.0), (4, 1.0)],
    }
    assert plots.search_ranks(table, tmp_path / "ranks.png")
    losses, ranks, _ = figures[1].axes
    assert legend(losses) == ["a", "b", "halved"]
    assert {line.get_label(): shown(line) for line in losses.lines} == {"a": [3, 2], "b": [2.5, 2.25], "halved": [4]}
    assert [shown(line) for line in ranks.lines] == [[1, 2], [2, 1]]
    assert all(float(tick) == int(tick) for tick in ranks.get_yticks())


@pytest.mark.parametrize(("fp8", "paper"), [(False, False), (True, True)])
def test_bars_of_throughput_stand_on_their_ticks_beside_the_teacher(
    figures: list[Any], tmp_path: Path, fp8: bool, paper: bool
) -> None:
    rows = [{"inputs": 128, "outputs": at, "batch": 1, "ratio": 2.0 + at} for at in (8, 16)]
    rows = [row | ({"ratio_fp8": 3.0} if fp8 else {}) for row in rows]
    assert plots.plot_bench(rows, tmp_path / "ratios.png", paper=paper)
    (axes,) = figures[0].axes
    bars = {at: [bar for bar in axes.patches if abs(bar.get_center()[0] - at) < 0.5] for at in axes.get_xticks()}
    assert len(bars) == 2 and {len(of_tick) for of_tick in bars.values()} == {2 if fp8 else 1}
    for at, of_tick in bars.items():
        assert sum(bar.get_center()[0] for bar in of_tick) / len(of_tick) == pytest.approx(at)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["128 / 8", "128 / 16"]
    assert axes.get_xlabel() == "input / output tokens"
    assert next(shown(line) for line in axes.lines if line.get_label() == "teacher") == [1.0, 1.0]
    others = [line.get_label() for line in axes.lines if line.get_label() != "teacher"]
    assert len(others) == (3 if paper else 0) and all("paper" in label and "H100" in label for label in others)
