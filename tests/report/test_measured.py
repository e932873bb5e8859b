"""What a run predicted beside what it made: shares of the score, parameters, bytes and work, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minitron_megatron.files import write_json
from minitron_megatron.report.measured import KEPT, PREDICTED, kept_rows, predicted_rows


def test_the_share_of_the_score_that_stays() -> None:
    scores = {
        "ffn": {0: [4.0, 3.0, 2.0, 1.0], 1: [1.0, 1.0, 1.0, 1.0], 2: [9.0, 0.0, 0.0, 1.0]},
        "hidden": {None: [1.0, 3.0]},
    }
    plan = {"ffn": {0: (0, 1), 2: (0, 3)}, "hidden": {None: (1,)}, "layers": {None: (0, 2)}}
    margins = {"ffn": {0: 0.5, 2: float("inf")}, "hidden": {None: 2 / 3}}
    assert len(KEPT) == 5
    assert kept_rows(plan, scores, margins) == [
        ("ffn", "2", "4", "70.0% to 100.0%", "5.0e-01"),
        ("hidden", "1", "2", "75.0%", "6.7e-01"),
        ("layers", "2", "-", "-", "-"),
    ]


def test_units_that_never_fired_have_no_share() -> None:
    assert kept_rows({"ffn": {0: (0,)}}, {"ffn": {0: [0.0, 0.0]}}, {}) == [("ffn", "1", "2", "-", "-")]
    assert kept_rows({"kv_groups": {0: (0,)}}, {}, {})[0][2:4] == ("-", "-")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    predicted = {"parameters": {"pruned": 100, "export": 100, "random": 100}, "export_bytes": 200, "rank_bytes": 5000}
    predicted |= {"flops": {"correct": 0, "score": 10**6, "distill": 3 * 10**6, "teacher": 10**6}}
    write_json(tmp_path / "predicted.json", predicted)
    for name, dtype in (("pruned", torch.float32), ("export", torch.bfloat16)):
        (tmp_path / name).mkdir()
        save_file(
            {"a": torch.zeros(10, 8, dtype=dtype), "b": torch.zeros(20, dtype=dtype)},
            tmp_path / name / "model.safetensors",
        )
    write_json(tmp_path / "stages" / "score.json", {"seconds": 2.0, "peak_bytes": 7000})
    write_json(tmp_path / "stages" / "distill.json", {"seconds": 4.0, "peak_bytes": 10000})
    return tmp_path


def test_files_memory_and_work_stand_beside_their_predictions(run: Path) -> None:
    rows = {row[0]: row[1:] for row in predicted_rows(run)}
    assert all(len(row) == len(PREDICTED) - 1 for row in rows.values())
    assert rows["parameters, pruned"] == ("100", "100", "1.000")
    assert rows["bytes of the export"] == ("200", "200", "1.000")
    assert rows["bytes of a rank (predicted: without activations, program and caches)"][2] == "2.000"
    assert rows["work of score"] == ("1.00e+06 FLOPs", "2.0 s: 5.00e+05 FLOP/s", "-")
    assert rows["work of distill"] == ("4.00e+06 FLOPs, 25% of it the teacher's", "4.0 s: 1.00e+06 FLOP/s", "-")
    assert "parameters, random" not in rows and "work of correct" not in rows


def test_a_model_of_another_size_is_seen(run: Path) -> None:
    save_file({"a": torch.zeros(10, 9)}, run / "pruned" / "model.safetensors")
    assert ("parameters, pruned", "100", "90", "0.900") in predicted_rows(run)


def test_torn_weights_cost_their_own_row_only(run: Path) -> None:
    (run / "pruned" / "model.safetensors").write_bytes(b"torn")
    rows = {row[0]: row for row in predicted_rows(run)}
    assert rows["parameters, pruned"][2] == "0" and rows["parameters, export"][3] == "1.000"


def test_a_run_without_predictions_has_no_rows(tmp_path: Path) -> None:
    assert predicted_rows(tmp_path) == []
