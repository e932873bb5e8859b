"""What was predicted of a run beside what was measured, and what each cut kept, as rows of text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files import read_json
from . import numbers
from .plots import ByLayer

__all__ = ["KEPT", "PREDICTED", "kept_rows", "predicted_rows"]

KEPT = ("axis", "kept", "of", "of the score", "closest cut's margin")
PREDICTED = ("", "predicted", "measured", "measured / predicted")
Row = tuple[str, ...]


def kept_rows(plan: ByLayer[Sequence[int]], scores: ByLayer[Sequence[float]], margins: ByLayer[float]) -> list[Row]:
    """A row an axis, under `KEPT`: kept units, units there were, their share of the score in the layers that stay (from
    the least layer to the most), and the closest cut."""
    rows: list[Row] = []
    for axis, layers in plan.items():
        kept = sorted({len(units) for units in layers.values()}) or [0]
        there = max(map(len, scores.get(axis, {}).values()), default=None)
        closest = min(filter(math.isfinite, margins.get(axis, {}).values()), default=None)
        margin = numbers.ABSENT if closest is None else f"{closest:.1e}"
        share = _span(_shares(layers, scores.get(axis, {})), "{:.1%}".format)
        rows.append((axis, _span(kept, numbers.count), numbers.count(there), share, margin))
    return rows


def _shares(kept: Mapping[int | None, Sequence[int]], scores: Mapping[int | None, Sequence[float]]) -> list[float]:
    """Of each layer, the sum of the kept units' scores over that of all."""
    shares = []
    for layer, units in kept.items():
        total = sum(scores.get(layer, ()))
        if total > 0:
            shares.append(sum(scores[layer][unit] for unit in units) / total)
    return sorted(shares)


def _span(values: Sequence[Any], write: Any) -> str:
    if not values:
        return numbers.ABSENT
    low, high = write(values[0]), write(values[-1])
    return low if low == high else f"{low} to {high}"


def predicted_rows(run: Path) -> list[Row]:
    """Rows under `PREDICTED`, of what a run folder holds of both: parameters in the files of each model, bytes of the
    export, memory of the fullest rank, and the work of each stage with the speed that its time makes of it."""
    try:
        predicted = read_json(run / "predicted.json")
    except (OSError, ValueError):
        return []
    rows = []
    for model, parameters in predicted["parameters"].items():
        if (run / model).is_dir():
            rows.append(_row(f"parameters, {model}", parameters, _held(run / model)[0], numbers.count))
    if (run / "export").is_dir():
        rows.append(_row("bytes of the export", predicted["export_bytes"], _held(run / "export")[1], numbers.count))
    stages = {path.stem: read_json(path) for path in sorted((run / "stages").glob("*.json"))}
    peaks = [stages[name].get("peak_bytes", 0) for name in ("correct", "distill") if name in stages]
    if any(peaks):
        label = "bytes of a rank (predicted: without activations, program and caches)"
        rows.append(_row(label, predicted["rank_bytes"], max(peaks), numbers.count))
    flops = {**predicted["flops"], "distill": predicted["flops"]["distill"] + predicted["flops"]["teacher"]}
    for name in ("correct", "score", "distill"):
        seconds = stages.get(name, {}).get("seconds")
        if seconds and flops[name]:
            rows.append(_work(name, flops[name], seconds, predicted["flops"]["teacher"]))
    return rows


def _row(name: str, predicted: int, measured: int, write: Any) -> Row:
    return name, write(predicted), write(measured), f"{measured / predicted:.3f}" if predicted else numbers.ABSENT


def _work(stage: str, flops: int, seconds: float, teacher: int) -> Row:
    apart = f", {teacher / flops:.0%} of it the teacher's" if stage == "distill" else ""
    speed = f"{flops / seconds:.2e} FLOP/s"
    return f"work of {stage}", f"{flops:.2e} FLOPs{apart}", f"{numbers.duration(seconds)}: {speed}", numbers.ABSENT


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
