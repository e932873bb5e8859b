"""Several runs on one page: their students side by side, curves overlaid, and how their recipes differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .. import numbers
from ..errors import CheckpointError
from ..files import read_as, whole_file
from ..records import Row, read_summary
from ..run_folder import RunFolder
from . import plots
from .html import figure, section, table, whole_page
from .listeners import read_metrics
from .measured import Predicted
from .tables import cells, student_of

__all__ = ["compare_runs"]

Recipe = Mapping[str, Any]
STUDENTS = ("run", "parameters", "loss (nats/token)", "lost to the teacher", "perplexity", "tokens", "FLOPs", "time")
UNCOMPARED = ("out",)
"""Keys that always differ."""


class _Run(NamedTuple):
    name: str
    recipe: Recipe
    rows: Sequence[Row]
    student: Row
    flops: float | None
    """Predicted FLOPs of the whole run."""
    metrics: Sequence[Mapping[str, Any]]


def compare_runs(recipes: Mapping[Path, Recipe], to: Path) -> Path:
    """Write `to/report.html` with its plots, and return the page's path.

    recipes: run folder -> its recipe. Raises CheckpointError for a folder without a measured student.
    """
    runs = [_run(path, recipe, name) for (path, recipe), name in zip(recipes.items(), _names(recipes), strict=True)]
    drawn = "".join(_figures(runs, to))
    unlike = table(("key", *(run.name for run in runs)), _differences(runs))
    body = section("Students", table(STUDENTS, [_cells(run) for run in runs]) + drawn)
    body += section("Keys in which the recipes differ", unlike)
    page = to / "report.html"
    to.mkdir(parents=True, exist_ok=True)
    with whole_file(page) as partial:
        partial.write_text(whole_page(f"{len(runs)} runs", "", body), encoding="utf-8")
    return page


def _names(paths: Mapping[Path, object]) -> list[str]:
    """Return a short name of each run, with its parent's where two are called alike."""
    short = [path.resolve().name for path in paths]
    return [
        name if short.count(name) == 1 else f"{path.resolve().parent.name}/{name}"
        for path, name in zip(paths, short, strict=True)
    ]


def _run(path: Path, recipe: Recipe, name: str) -> _Run:
    folder = RunFolder.existing(path)
    rows = read_summary(folder.summary)
    student = student_of(rows)
    if student is None:
        raise CheckpointError(f"{path} has no measured student yet. Run `evaluate` there, or leave it out.")
    predicted = read_as(folder.predicted, Predicted) if folder.predicted.is_file() else None
    flops = float(sum(predicted["flops"].values())) if predicted else None
    return _Run(name, recipe, rows, student, flops, read_metrics(folder.metrics))


def _cells(run: _Run) -> list[str]:
    _, parameters, loss, perplexity, tokens, seconds = cells(run.student)
    teacher, own = run.rows[0].get("loss_nats_per_token"), run.student.get("loss_nats_per_token")
    lost = numbers.ABSENT if teacher is None or own is None else f"{own - teacher:+.4f}"
    flops = numbers.ABSENT if run.flops is None else numbers.flops(run.flops)
    return [run.name, parameters, loss, lost, perplexity, tokens, flops, seconds]


def _figures(runs: Sequence[_Run], to: Path) -> Iterator[str]:
    students = {run.name: run.student for run in runs}
    teachers = {row["loss_nats_per_token"] for run in runs for row in run.rows[:1] if row.get("loss_nats_per_token")}
    drawn = {
        "Loss of each student against its size. Dashed: teachers.": plots.sizes(
            students, sorted(filter(None, teachers)), to / "plots" / "sizes.png"
        ),
        "Validation loss in training, of the stages that train the student.": plots.overlaid(
            {run.name: run.metrics for run in runs}, to / "plots" / "curves.png"
        ),
    }
    for caption, path in drawn.items():
        if path:
            yield figure(path, caption)


def _differences(runs: Sequence[_Run]) -> Iterator[list[str]]:
    """Yield (key, value in each run) of the keys that differ."""
    flat = [dict(_flat(run.recipe)) for run in runs]
    for key in dict.fromkeys(key for each in flat for key in each):
        values = [each.get(key, numbers.ABSENT) for each in flat]
        if len(set(values)) > 1 and key not in UNCOMPARED:
            yield [key, *values]


def _flat(recipe: Recipe, before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{key}.")
        elif value is not None and value != []:  # a key that is not given
            yield f"{before}{key}", json.dumps(value, ensure_ascii=False, default=str)
