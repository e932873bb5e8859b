"""HTML report of a run: one page and its plots, made from whatever the run folder has.

Knows: the names of files in a run folder. Must not know: how scores and plans are stored (the caller passes plain
mappings). Missing or damaged files are left out; a report never fails a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from statistics import median
from typing import TypeVar

from typing_extensions import TypedDict

from .. import numbers
from ..errors import FileError
from ..files import read_as, whole_file
from ..records import SAFE_MARGIN, Row
from ..run_folder import RunFolder
from . import plots
from .html import figure, section, table, warning_box, whole_page
from .importance import KEPT, kept_rows, shares
from .listeners import MetricsLine, lost_lines, read_metrics
from .measured import PREDICTED, predicted_rows
from .plots import ByLayer, DepthCurves
from .refitted import REFITTED, Fit, refitted_rows
from .searched import SEARCHED, SearchTable, searched_rows
from .tables import COLUMNS, cells, headline, tasks_of

__all__ = ["write_report"]

T = TypeVar("T")


def write_report(
    run: Path,
    *,
    scores: ByLayer[Sequence[float]] | None = None,
    plan: ByLayer[Sequence[int]] | None = None,
    margins: ByLayer[float] | None = None,
    totals: Mapping[str, int] | None = None,
    depth: DepthCurves | None = None,
) -> Path:
    """Write `report.html` and `plots/*.png` into a run folder; return the page's path.

    scores, plan, margins: axis -> layer (None if all layers share the axis) -> scores, kept units, margin of the cut.
    totals: axis -> units before the cut. depth: the metric of the network without some layers.
    """
    scores, plan, margins = scores or {}, plan or {}, margins or {}
    warnings: list[str] = []
    folder = RunFolder(run)
    summary = _read(folder.summary, list[Row], warnings) or []
    search = _read(folder.search_table, SearchTable, warnings)
    versions = _read(folder.versions, dict[str, str | int | None], warnings)
    stages = _read_stages(folder, warnings)
    metrics = read_metrics(folder.metrics)
    warnings += [*_lost_lines(folder.metrics), *_close_cuts(margins), *_lost_losses(metrics)]
    figures = {
        "losses": lambda path: plots.loss_curves(metrics, summary, path),
        "models": lambda path: plots.bars(summary, path),
        "preferences": lambda path: plots.preference_curves(metrics, path),
        "importance": lambda path: plots.importance(scores, plan, path),
        "depth": lambda path: plots.depth_curves(depth, path),
        "shares": lambda path: plots.shares(shares(plan, scores), path),
        "margins": lambda path: plots.margins(margins, path),
        "search": lambda path: plots.search_front(search, path),
        "ranks": lambda path: plots.search_ranks(search, path),
    }
    drawn = {name: _figure(folder, name, draw, warnings) for name, draw in figures.items()}
    kept = "".join(drawn[name] for name in ("depth", "importance", "shares", "margins"))
    sections = [
        section("Models", _summary(summary) + drawn["models"]),
        section("Training", drawn["losses"]),
        section("Preference optimisation", drawn["preferences"]),
        section("Search", table(SEARCHED, searched_rows(search)) + drawn["search"] + drawn["ranks"]),
        section("Pruning", table(KEPT, kept_rows(plan, scores, margins, totals)) + kept),
        section("Refit", table(REFITTED, refitted_rows(_read(folder.refit, list[Fit], warnings)))),
        section("Predicted and measured", table(PREDICTED, predicted_rows(run))),
        section("Stages", _stages(stages, metrics)),
        section("Recipe", _recipe(folder.recipe)),
        section("Versions", _pairs(versions or {})),
    ]
    body = warning_box(warnings) + "".join(sections)
    with whole_file(folder.report) as partial:
        lead = " ".join(filter(None, (headline(summary), _origin(folder))))
        partial.write_text(whole_page(run.resolve().name, lead, body), encoding="utf-8")
    return folder.report


# ---------------------------------------------------------------------------------------------------------- run folder


class StageFile(TypedDict, total=False):
    """Fields of a stage's record that the page shows."""

    seconds: float | None


def _read(path: Path, kind: type[T], warnings: list[str]) -> T | None:
    """Return a JSON file's contents; None if it is absent, or damaged, which adds a warning."""
    if not path.exists():
        return None
    try:
        return read_as(path, kind)
    except FileError as error:
        warnings.append(f"{error} It is left out.")
        return None


def _origin(run: RunFolder) -> str:
    """Return the teacher as the recipe names it, and the day of the last evaluation; empty without both files."""
    teacher = (_read(run.predicted, dict[str, object], []) or {}).get("model")
    if not teacher or not run.summary.is_file():
        return ""
    day = datetime.fromtimestamp(run.summary.stat().st_mtime).date()
    return f"Teacher: {teacher}. {day.day} {day:%B %Y}."


def _read_stages(run: RunFolder, warnings: list[str]) -> dict[str, StageFile]:
    """Return the records by stage, in the order in which the stages ended."""
    found = {path.stem: _read(path, StageFile, warnings) for path in run.record_paths()}
    return {name: record for name, record in found.items() if record is not None}


def _lost_lines(path: Path) -> list[str]:
    lost = lost_lines(path)
    return [f"{path} has {numbers.counted(lost, 'invalid line')}, left out here."] if lost else []


def _close_cuts(margins: ByLayer[float]) -> list[str]:
    """Return a warning for each cut that may differ at another parallel layout."""
    return [
        f"The cut of {_cut(axis, layer)} has a relative margin of {margin:.1e}, below {SAFE_MARGIN:g}: "
        "another parallel layout may keep different units."
        for axis, layers in margins.items()
        for layer, margin in layers.items()
        if margin < SAFE_MARGIN
    ]


def _cut(axis: str, layer: int | None) -> str:
    return axis if layer is None else f"{axis} in layer {layer}"


def _lost_losses(metrics: Iterable[MetricsLine]) -> list[str]:
    """Return a warning for each stage whose loss was not finite (null in `metrics.jsonl`)."""
    lost: dict[str, list[int]] = {}
    for line in metrics:
        if "loss" in line and line["loss"] is None:
            lost.setdefault(line["stage"], []).append(line["done"])
    return [
        f"The loss of {stage} was not finite at step {first}" + (f" and at {len(more)} more steps." if more else ".")
        for stage, (first, *more) in lost.items()
    ]


# ------------------------------------------------------------------------------------------------------- pieces of HTML

CAPTIONS = {
    "models": "Cross-entropy of each model on the same validation tokens. Lower is better.",
    "losses": "Thin lines show single steps, thick lines a running mean over a tenth of the curve. "
    "Cross-entropy and KL divergence are not comparable, so each has its own panel.",
    "preferences": "Faint lines: training. Dots: held-out pairs. A gain is log p under the student minus log p under "
    "the start of the round; the distance is minus the mean gain, which estimates KL(start || student) if the start of "
    "the round wrote the responses.",
    "importance": "Scores sorted from the best unit to the worst. Kept units are drawn in full colour, pruned ones "
    "faintly. A dashed line marks the cut where every layer keeps exactly its best units.",
    "depth": "Metric without a block of layers (for block importance: between the block's input and output), against "
    "the last layer of the block. Dashed: the same number of layers, removed one by one where it hurts least.",
    "search": "All candidates within the budget. The line joins the Pareto-optimal ones: no other candidate is better "
    "in loss and in every budgeted cost.",
    "ranks": "Held-out loss of each candidate during its light distillation, and the ranks of those that were "
    "distilled to the last step. Below: Spearman's correlation of each ranking with the last one.",
    "shares": "Sum of the scores of the kept units, over that of all units in the layer.",
    "margins": "Relative difference between the scores of the last kept and the first pruned unit. "
    "An exact tie is drawn at the lower edge.",
}


def _figure(run: RunFolder, name: str, draw: Callable[[Path], Path | None], warnings: list[str]) -> str:
    """Draw `plots/<name>.png` and return its HTML; if that fails, add a warning and return an empty string."""
    try:
        path = draw(run.plots / f"{name}.png")
    except Exception as error:
        warnings.append(f"The plot of {name} could not be drawn: {type(error).__name__}: {error}")
        return ""
    return figure(path, CAPTIONS[name]) if path else ""


def _summary(rows: Sequence[Row]) -> str:
    tasks = tasks_of(rows)
    return table([*(title for title, _ in COLUMNS.values()), *tasks], (cells(row, tasks) for row in rows))


def _stages(stages: Mapping[str, StageFile], metrics: Sequence[MetricsLine]) -> str:
    """Return a table with one row per stage, in the order in which they ended: time, work, tokens and speed."""
    times = [(name, stage.get("seconds")) for name, stage in stages.items()]
    rows = [(name, numbers.duration(seconds), *_work(name, metrics)) for name, seconds in times]
    if len(rows) > 1:
        rows.append(("all", numbers.duration(sum(seconds or 0.0 for _, seconds in times)), "", "", ""))
    return table(("stage", "time", "work", "tokens", "tokens/s (median)"), rows)


def _work(stage: str, metrics: Sequence[MetricsLine]) -> tuple[str, str, str]:
    """Return a stage's work (such as `200 steps`), tokens and median speed, as text."""
    lines = [line for line in metrics if line["stage"] == stage]
    if not lines:
        return (numbers.ABSENT,) * 3
    speeds = [line["tokens_per_second"] for line in lines if line.get("tokens_per_second") is not None]
    done, unit = lines[-1]["done"], lines[-1].get("unit", "")
    work = numbers.size(done) if unit == "bytes" else f"{numbers.count(done)} {unit}"
    return work, numbers.count(lines[-1].get("tokens")), numbers.count(median(speeds) if speeds else None)


def _recipe(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        return f'<pre tabindex="0">{escape(text)}</pre>'
    except OSError:
        return ""


def _pairs(pairs: Mapping[str, object]) -> str:
    """Return a mapping as a table with two columns."""
    rows = ((name, numbers.ABSENT if value is None else str(value)) for name, value in pairs.items())
    return table(("name", "version"), rows)
