"""Several runs on one page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.errors import CheckpointError
from minitron_megatron.report import compare_runs
from tests.report.test_page import Outline


def run_of(folder: Path, metrics: list[dict[str, Any]], summary: list[dict[str, Any]], loss: float) -> Path:
    (folder / "stages").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    rows = [*summary[:2], summary[2] | {"model": "distilled", "loss_nats_per_token": loss}]
    (folder / "summary.json").write_text(json.dumps(rows))
    (folder / "recipe.yaml").write_text("")
    return folder


def test_students_curves_and_the_keys_that_differ(
    tmp_path: Path, metrics: list[dict[str, Any]], summary: list[dict[str, Any]]
) -> None:
    one, two = (run_of(tmp_path / where / "run", metrics, summary, loss) for where, loss in (("a", 2.8), ("b", 3.0)))
    shared = {"seed": 1, "correct": None, "prune": {"ffn": 24}}
    recipes = {one: shared | {"out": "a"}, two: shared | {"out": "b", "prune": {"ffn": 48}, "align": []}}
    page = compare_runs(recipes, tmp_path / "both")
    found = Outline(page.read_text(encoding="utf-8"))
    assert found.headings == ["Students", "Keys in which the recipes differ"]
    assert len(found.images) == 2
    assert all((page.parent / "plots" / f"{name}.png").stat().st_size > 1000 for name in ("sizes", "curves"))
    assert found.cells[-3:] == ["prune.ffn", "24", "48"] and found.cells.count("a/run") == 1
    assert [cell for cell in found.cells if cell.startswith("+")] == ["+0.0877", "+0.2877"]


def test_a_run_without_a_student_is_refused(tmp_path: Path, summary: list[dict[str, Any]]) -> None:
    run = run_of(tmp_path / "run", [], summary, 2.8)
    (run / "summary.json").write_text(json.dumps(summary[:2]))
    with pytest.raises(CheckpointError, match=r"run has no measured student yet\. Run `evaluate` there, or"):
        compare_runs({run: {}, run.parent / "other": {}}, tmp_path / "both")
