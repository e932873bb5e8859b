"""Measure every model of the run on held-out text and tasks."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from typing_extensions import TypedDict

from ...errors import TrainingError
from ...evaluate import ValidationSet
from ...events import Event
from ...files import read_as, write_json
from ...parallel import broadcast_object, fail_together
from ...records import Row
from ..context import Context
from ..fingerprint import task_marks
from ..measure_tasks import Measured, measured_row, write_table
from ..refitting import refitted_models
from ..stage import Result, Stage

__all__ = ["EVALUATE"]


class Evaluated(TypedDict):
    loss: dict[str, float | None]


def do_evaluate(context: Context) -> Result:
    """Measure loss and task scores of every model of the run, and write the summary."""
    held_out = context.held_out()
    models: dict[str, tuple[Path, str]] = {"teacher": (context.recipe.model, "")}
    if context.recipe.corrects_first:
        models["corrected teacher"] = (context.folders.model("corrected"), "correct")
    if context.recipe.student:
        models["student"] = (context.recipe.student, "")
    else:
        models |= {name: (context.folders.model(folder), "prune") for name, folder in refitted_models(context).items()}
    models["distilled"] = (context.folders.model("distilled"), "distill")
    models |= {f"aligned-{n}": (context.aligned(n), f"align-{n}") for n in range(1, len(context.recipe.align) + 1)}
    if context.recipe.random_baseline:
        models["random init"] = (context.folders.model("random"), "baseline")
    rows: list[Row] = []
    for number, (name, (folder, stage)) in enumerate(models.items(), 1):
        row = _row(context, name, folder, held_out)
        loss = {f"loss/{name}": row["loss_nats_per_token"]}
        context.listener(Event("evaluate", number, len(models), "models", loss))
        done = context.done.get(stage, {})
        tokens = done["units"] if done.get("method") == "sft" else done.get("tokens", 0)
        rows.append({**row, "tokens": tokens, "seconds": done.get("seconds", 0.0)})
    if context.topology.rank == 0:
        write_json(context.folders.summary, rows)
        write_table(rows, context.folders.evaluation / "table.md")
        shutil.rmtree(context.folders.evaluation_parts, ignore_errors=True)
    return {"loss": {row["model"]: row["loss_nats_per_token"] for row in rows}}


def _row(context: Context, name: str, folder: Path, held_out: ValidationSet) -> Measured:
    """Return a model's row of the summary; a row that an interrupted run has measured is reused."""
    path = context.folders.evaluation_parts / context.mark_of(context.recipe)[:16] / f"{name.replace(' ', '_')}.json"
    with fail_together():
        mine = read_as(path, Measured) if path.is_file() and context.topology.rank == 0 else None
    kept: Measured | None = broadcast_object(mine)
    if kept:
        return kept
    row = measured_row(context, name, folder, held_out)
    if not math.isfinite(row["loss_nats_per_token"]):
        raise TrainingError(
            f"{folder} has a loss of {row['loss_nats_per_token']} on the held-out text. Check its training."
        )
    if context.topology.rank == 0:
        write_json(path, row)
    return row


EVALUATE = Stage(
    "evaluate",
    do_evaluate,
    result=Evaluated,
    makes=lambda run: run.summary,
    makes_too=lambda run: (run.evaluation,),
    reads=("evaluate", "dtype"),
    after=("prepare", "correct", "prune", "distill", "align", "baseline"),
    extra_inputs=lambda recipe: task_marks(recipe) if recipe.evaluate.wanted() else None,
    keeps=lambda run, mark: run.evaluation_parts / mark[:16],
)
