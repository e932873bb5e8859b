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
    assert rows["bytes of the export"] == ("200", "200", "1.000")
    assert rows["peak bytes per rank (predicted: without activations)"] == ("5,000", "10,000", "2.000")
    assert rows["FLOPs of score"] == ("1.00e+06", "2.0 s: 5.00e+05 FLOP/s", "-")
    assert rows["FLOPs per step of distill"] == ("1.00e+06, 25% the teacher's", "0.5 s: 2.00e+06 FLOP/s", "-")
    assert len(rows) == 7  # no random model, no correction


def test_the_slowest_rank_is_named(run: Path) -> None:
    metrics = MetricsFile(run / "metrics.jsonl")
    for step, (rank, seconds) in enumerate(((3, 2.0), (1, 1.1), (3, 4.0)), 4):
        values = {"slowest_rank": rank, "slowest_seconds": seconds, "median_seconds": 1.0}
        metrics(Event("distill", step, 8, values=values | {"tokens": 1, "tokens_per_second": 1.0}))
    rows = {row[0]: row[2] for row in predicted_rows(run)}
    assert rows["slowest rank of distill, own work"] == "rank 3, in 2 of 3 measurements: 3.00 x the median time"


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
    assert len(predicted_rows(run)) == 7
    (run / name).write_bytes(content)
    assert len(predicted_rows(run)) in (0, 6)
    assert predicted_rows(run / "nowhere") == []
