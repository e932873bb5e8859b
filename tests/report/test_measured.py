"""Table of predicted and measured parameters, bytes and FLOPs, compared with values computed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minitron_megatron.events import Event
from minitron_megatron.files import write_json
from minitron_megatron.report import MetricsFile
from minitron_megatron.report.measured import PREDICTED, predicted_rows


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run, sizes = tmp_path / "run", {"teacher": 100, "pruned": 100, "export": 100, "random": 100}
    predicted = {"model": str(tmp_path / "theirs"), "parameters": sizes, "export_bytes": 200, "rank_bytes": 5000}
    predicted |= {"flops": {"correct": 0, "score": 10**6, "distill": 4 * 10**6, "baseline": 0}, "teacher_flops": 10**6}
    write_json(run / "predicted.json", predicted)
    for folder, dtype in (("theirs", torch.bfloat16), ("run/pruned", torch.float32), ("run/export", torch.bfloat16)):
        (tmp_path / folder).mkdir()
        tensors = {"a": torch.zeros(10, 8, dtype=dtype), "b": torch.zeros(20, dtype=dtype)}
        save_file(tensors, tmp_path / folder / "model.safetensors")
    write_json(run / "stages" / "score.json", {"seconds": 2.0, "peak_bytes": 7000})
    write_json(run / "stages" / "distill.json", {"seconds": 40.0, "peak_bytes": 10000})
    metrics = MetricsFile(run / "metrics.jsonl")
    for step, speed in enumerate((1.0, 64.0, 128.0), 1):
        metrics(Event("distill", step, 4, values={"tokens": 32 * step, "tokens_per_second": speed}))
    return run


def test_files_memory_and_work_stand_beside_their_predictions(run: Path) -> None:
    rows = {row[0]: row[1:] for row in predicted_rows(run)}
    assert all(len(row) == len(PREDICTED) - 1 for row in rows.values())
    assert rows["parameters, teacher"] == rows["parameters, pruned"] == ("100", "100", "1.000")
    assert rows["size of the export"] == ("200 B", "200 B", "1.000")
    assert rows["memory of the fullest rank (predicted: without activations)"] == ("4.88 KiB", "9.77 KiB", "-")
    assert rows["compute of score"] == ("1.00 MFLOP", "500 kFLOP/s", "-")
    assert rows["compute per step of distill"] == ("1.00 MFLOP", "2.00 MFLOP/s", "-")
    assert rows["  of it the teacher's"] == ("25%", "-", "-")
    assert len(rows) == 8  # no random model, no correction


def test_the_slowest_rank_is_named(run: Path) -> None:
    metrics = MetricsFile(run / "metrics.jsonl")
    for step, (rank, seconds) in enumerate(((3, 2.0), (1, 1.1), (3, 4.0)), 4):
        values = {"slowest_rank": rank, "slowest_seconds": seconds, "median_seconds": 1.0}
        metrics(Event("distill", step, 8, values=values | {"tokens": 1, "tokens_per_second": 1.0}))
    rows = {row[0]: row[2] for row in predicted_rows(run)}
    assert rows["slowest rank of distill, its own work"] == "rank 3 in 2 of 3"
    assert rows["  its time over the median rank's"] == "3.00"


def test_a_model_of_another_size_is_seen(run: Path) -> None:
    save_file({"a": torch.zeros(10, 9)}, run / "pruned" / "model.safetensors")
    assert ("parameters, pruned", "100", "90", "0.900") in predicted_rows(run)


def test_torn_weights_cost_their_own_row_only(run: Path) -> None:
    (run / "pruned" / "model.safetensors").write_bytes(b"torn")
    rows = {row[0]: row for row in predicted_rows(run)}
    assert rows["parameters, pruned"][2] == "0" and rows["parameters, export"][3] == "1.000"


@pytest.mark.parametrize("name", ["predicted.json", "stages/distill.json"])
@pytest.mark.parametrize("content", [b"", b"[1, null]", b'{"seconds": "long"}'])
def test_torn_records_are_no_rows(run: Path, name: str, content: bytes) -> None:
    assert len(predicted_rows(run)) == 8
    (run / name).write_bytes(content)
    assert len(predicted_rows(run)) in (0, 7)
    assert predicted_rows(run / "nowhere") == []
