"""Predicted and measured sizes, memory and FLOPs of a run, as table rows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median

from typing_extensions import TypedDict

from .. import numbers
from ..errors import CheckpointError
from ..files import read_json
from ..run_folder import RunFolder
from .listeners import MetricsLine, read_metrics

__all__ = ["PREDICTED", "Predicted", "predicted_rows"]

PREDICTED = ("", "predicted", "measured", "ratio")
INDENT = "  "
"""Beginning of the name of a row that belongs to the one above."""
DISTIL = ("distill", "baseline")
TRAIN = ("correct", *DISTIL)
Row = tuple[str, ...]


class Predicted(TypedDict):
    """Contents of a run's `predicted.json`: elements, bytes and FLOPs."""

    model: str
    parameters: dict[str, int]
    export_bytes: int
    rank_bytes: int
    flops: dict[str, float]
    teacher_flops: float


class StageCost(TypedDict, total=False):
    """Fields of a stage's record that are compared."""

    seconds: float
    peak_bytes: int


def predicted_rows(run: Path) -> list[Row]:
    """Return rows with the columns `PREDICTED`: parameters of each model's files, bytes of the export, memory of the
    fullest rank, and FLOPs of each stage with the speed reached.

    Empty if the records are missing, damaged or of another version.
    """
    try:
        folder = RunFolder(run)
        predicted: Predicted = read_json(folder.predicted)
        stages: dict[str, StageCost] = {path.stem: read_json(path) for path in folder.record_paths()}
        metrics = read_metrics(folder.metrics)
        return _sizes(folder, predicted, stages) + _work(predicted, stages, metrics) + _slowest(metrics)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        return []


def _sizes(run: RunFolder, predicted: Predicted, stages: Mapping[str, StageCost]) -> list[Row]:
    """Return rows on the parameters of each model, the bytes of the export, and memory."""
    rows: list[Row] = []
    for model, parameters in predicted["parameters"].items():
        folder = Path(predicted["model"]) if model == "teacher" else run.model(model)
        if folder.is_dir():
            rows.append(_row(f"parameters, {model}", parameters, _stored(folder)[0]))
    if run.model("export").is_dir():
        stored = _stored(run.model("export"))[1]
        rows.append(_row("size of the export", predicted["export_bytes"], stored, numbers.size))
    peak = max((stages[name].get("peak_bytes", 0) for name in TRAIN if name in stages), default=0)
    if peak:
        sizes = (numbers.size(each) for each in (predicted["rank_bytes"], peak))
        rows.append(("memory of the fullest rank (predicted: without activations)", *sizes, numbers.ABSENT))
    return rows


def _row(name: str, predicted: int, measured: int, write: Callable[[float], str] = numbers.count) -> Row:
    ratio = f"{measured / predicted:.3f}" if predicted else numbers.ABSENT
    return name, write(predicted), write(measured), ratio


def _work(predicted: Predicted, stages: Mapping[str, StageCost], metrics: Sequence[MetricsLine]) -> list[Row]:
    """Return rows on the FLOPs of a training step, or of a whole other stage, with its time and the speed reached."""
    rows: list[Row] = []
    for stage, flops in predicted["flops"].items():
        lines = [line for line in metrics if line["stage"] == stage and line.get("tokens_per_second")]
        seconds, name = stages.get(stage, {}).get("seconds"), f"compute of {stage}"
        if stage in TRAIN and lines:
            last = lines[-1]
            flops, name = flops / last["total"], f"compute per step of {stage}"
            seconds = last["tokens"] / last["done"] / median(line["tokens_per_second"] for line in lines)
        if flops and seconds:
            teacher = predicted["teacher_flops"] / predicted["flops"][stage] if stage in DISTIL else 0
            rows.append((name, numbers.flops(flops), f"{numbers.flops(flops / seconds)}/s", numbers.ABSENT))
            if teacher:
                rows.append((f"{INDENT}of it the teacher's", f"{teacher:.0%}", numbers.ABSENT, numbers.ABSENT))
    return rows


def _slowest(metrics: Sequence[MetricsLine]) -> list[Row]:
    """Return a row per training stage on its straggler: the rank that was slowest most often, if ranks were timed."""
    rows: list[Row] = []
    for stage in TRAIN:
        samples = [line for line in metrics if line["stage"] == stage and "slowest_rank" in line]
        if samples:
            rank, often = Counter(line["slowest_rank"] for line in samples).most_common(1)[0]
            ratio = median(
                line["slowest_seconds"] / line["median_seconds"] for line in samples if line["slowest_rank"] == rank
            )
            text = f"rank {rank} in {often} of {len(samples)}"
            rows.append((f"slowest rank of {stage}, its own work", numbers.ABSENT, text, numbers.ABSENT))
            rows.append((f"{INDENT}its time over the median rank's", numbers.ABSENT, f"{ratio:.2f}", numbers.ABSENT))
    return rows


def _stored(folder: Path) -> tuple[int, int]:
    """Return (elements, bytes) of a folder's safetensors, from their headers; zeros if they cannot be read."""
    from ..convert import Weights

    try:
        weights = Weights(folder)
    except CheckpointError:
        return 0, 0
    parameters = sum(math.prod(weights.shape(name)) for name in weights.names())
    return parameters, sum(_tensor_bytes(file) for file in folder.glob("*.safetensors"))


def _tensor_bytes(file: Path) -> int:
    """Return a file's length without its header, whose length is in the first eight bytes."""
    with file.open("rb") as opened:
        return file.stat().st_size - 8 - int.from_bytes(opened.read(8), "little")
