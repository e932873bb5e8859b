"""Measure a model by the recipe: its loss on the held-out text and its scores at the tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from typing_extensions import TypedDict

from ..data import transformers_tokenizer
from ..evaluate import (
    HarnessResults,
    RunBatches,
    Task,
    ValidationSet,
    lower_is_better,
    run_tasks,
    scores_of,
    validation_loss,
)
from ..files import whole_file, write_json
from ..forecast import settings_folder
from ..layout import parameters
from ..model import Chunk, chunks_of, shape_of
from ..records import Row
from ..score import Metric
from .context import Context

__all__ = ["Measured", "depth_metric", "measured_row", "score_of", "write_table"]


class Measured(TypedDict):
    """A model's row of the summary, before the stage `evaluate` adds what the model cost."""

    model: str
    parameters: int
    loss_nats_per_token: float
    perplexity: float
    loss_by_source: dict[str, float | None]
    tasks: dict[str, float | None]


def measured_row(context: Context, name: str, folder: Path, held_out: ValidationSet) -> Measured:
    """Return a model's row of the summary: loss on the held-out text and task scores. Collective."""
    model = context.load(folder)
    losses = validation_loss(model, held_out, context.topology)
    return {
        "model": name,
        "parameters": parameters(shape_of(chunks_of(model)[0])),
        "loss_nats_per_token": losses["all"],
        "perplexity": math.exp(min(losses["all"], 700.0)),
        "loss_by_source": {source: loss for source, loss in losses.items() if source != "all"},
        "tasks": {**_evaluate_tasks(context, model, name.replace(" ", "_"), folder)},
    }


def _evaluate_tasks(context: Context, model: list[Chunk], name: str, folder: Path) -> dict[str, float | None]:
    """Return task -> score, and write the results to `evaluation/<name>.json`. Collective.

    Answers of conversations stand beside it, in `<name>-<task>.jsonl`.
    """
    tasks = context.recipe.evaluate.wanted()
    if not tasks:
        return {}
    found = _harness_results(context, model, tasks, folder=folder, answers=context.folders.evaluation / name)
    if context.topology.rank == 0:
        write_json(context.folders.evaluation / f"{name}.json", found)
    return scores_of(found, tasks)


def score_of(context: Context, model: list[Chunk], name: str) -> float:
    """Return a model's score at one of the recipe's tasks, negated if lower is better. Collective.

    The task has a score: `check_evaluation` has seen that there is a judge if it needs one.
    """
    task = next(task for task in context.recipe.evaluate.wanted() if task.name == name)
    found = _harness_results(context, model, [task])
    score = scores_of(found, [task])[name]
    assert score is not None
    return score * (-1 if lower_is_better(found, task) else 1)


def depth_metric(context: Context, model: list[Chunk], task: Task) -> Metric:
    """Return the function that measures a network, such as a model without some layers, by its score at a task.

    Collective over the world.
    """

    def metric(run: RunBatches) -> float:
        score = scores_of(_harness_results(context, model, [task], run), [task])[task.name]
        assert score is not None
        return score

    metric.__name__ = task.name
    return metric


def _harness_results(
    context: Context,
    model: list[Chunk],
    tasks: list[Task],
    run: RunBatches | None = None,
    folder: Path | None = None,
    answers: Path | None = None,
) -> HarnessResults:
    keys = context.recipe.evaluate
    return run_tasks(
        model,
        tasks,
        transformers_tokenizer(context.recipe.model),
        context.topology,
        files=keys.task_files,
        folder=settings_folder(context.recipe, folder or context.recipe.model),
        limit=keys.limit,
        truncate=keys.truncate,
        chat=keys.chat,
        judge=keys.judge,
        answers=answers,
        seed=context.recipe.seed,
        micro_batch=keys.micro_batch,
        run=run,
        listener=context.listener,
    )


def write_table(rows: Sequence[Row], path: Path) -> None:
    """Write the task scores as a Markdown table, one row per model; nothing if there are no tasks."""
    names = list(rows[0]["tasks"]) if rows else []
    if not names:
        return
    lines = [["model", *names], ["---"] * (len(names) + 1)]
    for row in rows:
        scores = [row["tasks"][name] for name in names]
        lines.append([row["model"], *("-" if score is None else f"{score:.4f}" for score in scores)])
    with whole_file(path) as partial:
        partial.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines), encoding="utf-8")
