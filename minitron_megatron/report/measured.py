"""What was predicted of a run beside what was measured, as rows of text."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ..errors import CheckpointError
from ..files import read_json
from ..run_folder import RunFolder
from . import numbers
from .listeners import read_metrics

__all__ = ["PREDICTED", "predicted_rows"]

PREDICTED = ("", "predicted", "measured", "measured / predicted")
DISTIL = ("distill", "baseline")
TRAIN = ("correct", *DISTIL)
Row = tuple[str, ...]


def predicted_rows(run: Path) -> list[Row]:
    """Rows under `PREDICTED`, of what a run folder holds of both: parameters in the files of each model, bytes of the
    export, memory of the fullest rank, and the work of each stage with the speed that its time makes of it.

    None where the records are missing, torn or of another version.
    """
    try:
        folder = RunFolder(run)
        predicted = read_json(folder.predicted)
        stages = {path.stem: read_json(path) for path in folder.record_paths()}
        metrics = read_metrics(folder.metrics)
        return _sizes(folder, predicted, stages) + _work(predicted, stages, metrics) + _slowest(metrics)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        return []


def _sizes(run: RunFolder, predicted: Mapping[str, Any], stages: Mapping[str, Any]) -> list[Row]:
    """Numbers in the files of each model, bytes in those of the export, and memory."""
    rows: list[Row] = []
    for model, parameters in predicted["parameters"].items():
        folder = Path(predicted["model"]) if model == "teacher" else run.model(model)
        if folder.is_dir():
            rows.append(_row(f"parameters, {model}", parameters, _held(folder)[0]))
    if run.model("export").is_dir():
        rows.append(_row("bytes of the export", predicted["export_bytes"], _held(run.model("export"))[1]))
    peak = max((stages[name].get("peak_bytes", 0) for name in TRAIN if name in stages), default=0)
    if peak:
        rows.append(_row("bytes of a rank (predicted: without activations)", predicted["rank_bytes"], peak))
    return rows


def _row(name: str, predicted: int, measured: int) -> Row:
    ratio = f"{measured / predicted:.3f}" if predicted else numbers.ABSENT
    return name, numbers.count(predicted), numbers.count(measured), ratio


def _work(predicted: Mapping[str, Any], stages: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[Row]:
    """FLOPs of a training step, or of the whole stage `score`, beside the time that they took and the speed reached."""
    rows: list[Row] = []
    for stage, flops in predicted["flops"].items():
        lines = [line for line in metrics if line["stage"] == stage and line.get("tokens_per_second")]
        seconds, name = stages.get(stage, {}).get("seconds"), f"FLOPs of {stage}"
        if stage in TRAIN and lines:
            last = lines[-1]
            flops, name = flops / last["total"], f"FLOPs of a step of {stage}"
            seconds = last["tokens"] / last["done"] / median(line["tokens_per_second"] for line in lines)
        if flops and seconds:
            taught = predicted["teacher_flops"] / predicted["flops"][stage] if stage in DISTIL else 0
            apart = f", {taught:.0%} the teacher's" if taught else ""
            speed = f"{numbers.duration(seconds)}: {flops / seconds:.2e} FLOP/s"
            rows.append((name, f"{flops:.2e}{apart}", speed, numbers.ABSENT))
    return rows


def _slowest(metrics: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Of each training stage the rank that was slowest most often, where ranks were compared."""
    rows: list[Row] = []
    for stage in TRAIN:
        looks = [line for line in metrics if line["stage"] == stage and "slowest_rank" in line]
        if looks:
            rank, often = Counter(line["slowest_rank"] for line in looks).most_common(1)[0]
            times = median(
                line["slowest_seconds"] / line["median_seconds"] for line in looks if line["slowest_rank"] == rank
            )
            said = f"rank {rank}, in {often} of {len(looks)} looks: {times:.2f} of the median"
            rows.append((f"slowest rank of {stage}, by itself", numbers.ABSENT, said, numbers.ABSENT))
    return rows


def _held(folder: Path) -> tuple[int, int]:
    """(numbers, bytes) of the tensors in a folder's safetensors, by their headers; zeros where they cannot be read."""
    from ..convert import Weights

    try:
        weights = Weights(folder)
    except CheckpointError:
        return 0, 0
    parameters = sum(math.prod(weights.shape(name)) for name in weights.names())
    return parameters, sum(_tensor_bytes(file) for file in folder.glob("*.safetensors"))


def _tensor_bytes(file: Path) -> int:
    """A file's length without its header, which says its own length in the first eight bytes."""
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")
