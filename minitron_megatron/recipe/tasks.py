"""How good a model is by the recipe: its loss on the held-out text, and the tasks that the recipe names."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..data import transformers_tokenizer
from ..evaluate import Run, Task, ValidationSet, check_tasks, lower_is_better, run_tasks, scores_of, validation_loss
from ..files import whole_file, write_json
from ..layout import parameters
from ..model import chunks_of, config_of
from .context import Context
from .schema import Recipe

__all__ = ["WINOGRANDE", "check_evaluation", "measured_row", "score_of", "winogrande", "write_table"]

WINOGRANDE = Task("winogrande", 5, "acc")
"""As the second paper chooses layers by it."""


def check_evaluation(recipe: Recipe, folder: Path | None = None) -> None:
    """Check the tasks that a recipe names, and the one that chooses layers, before work begins. Raises MinitronErrors.

    folder: the model that runs them; None: the recipe's.
    """
    keys, depth = recipe.evaluate, recipe.score.depth
    tokenizer = recipe.model if any(recipe.model.glob("tokenizer*")) else None  # an estimate needs none
    for tasks in (keys.wanted(), [WINOGRANDE] if depth and depth.metric == "winogrande" else []):
        if tasks:
            check_tasks(
                tasks,
                keys.task_files,
                run_code=keys.run_code,
                tokenizer=tokenizer,
                model=_settings(recipe, folder or recipe.model),
                chat=keys.chat,
                truncate=keys.truncate,
            )


def _settings(recipe: Recipe, folder: Path) -> Path:
    """The folder whose generation settings count: a model's own, or the recipe's model's where it has none."""
    return folder if (folder / "generation_config.json").is_file() else recipe.model


def measured_row(context: Context, name: str, folder: Path, held_out: ValidationSet) -> dict[str, Any]:
    """Loss on the held-out text and the tasks' scores of a model, as a row of the summary. Collective."""
    model = context.load(folder)
    losses = validation_loss(model, held_out, context.topology)
    return {
        "model": name,
        "parameters": parameters(config_of(chunks_of(model)[0]).shape),
        "loss_nats_per_token": losses["all"],
        "perplexity": math.exp(min(losses["all"], 700.0)),
        "loss_by_source": {source: loss for source, loss in losses.items() if source != "all"},
        "tasks": _evaluate_tasks(context, model, name.replace(" ", "_"), folder),
    }


def _evaluate_tasks(context: Context, model: Any, name: str, folder: Path) -> dict[str, float]:
    """Task -> score; the harness's own results go to `evaluation/<name>.json`. Collective over the world."""
    tasks = context.recipe.evaluate.wanted()
    if not tasks:
        return {}
    found = _run(context, model, tasks, folder=folder)
    if context.topology.rank == 0:
        write_json(context.folders.evaluation / f"{name}.json", found)
    return scores_of(found, tasks)


def score_of(context: Context, model: Any, name: str) -> float:
    """A model's score at one of the recipe's tasks, more is better: of a perplexity the negative. Collective."""
    task = next(task for task in context.recipe.evaluate.wanted() if task.name == name)
    found = _run(context, model, [task])
    return scores_of(found, [task])[name] * (-1 if lower_is_better(found, task) else 1)


def winogrande(context: Context, model: Any, run: Run) -> float:
    """Accuracy of what `run` runs of a model. Collective over the world."""
    return scores_of(_run(context, model, [WINOGRANDE], run), [WINOGRANDE])[WINOGRANDE.name]


def _run(
    context: Context, model: Any, tasks: list[Task], run: Run | None = None, folder: Path | None = None
) -> dict[str, Any]:
    keys = context.recipe.evaluate
    return run_tasks(
        model,
        tasks,
        transformers_tokenizer(context.recipe.model),
        context.topology,
        files=keys.task_files,
        folder=_settings(context.recipe, folder or context.recipe.model),
        limit=keys.limit,
        truncate=keys.truncate,
        chat=keys.chat,
        seed=context.recipe.seed,
        micro_batch=keys.micro_batch,
        run=run,
        listener=context.listener,
    )


def write_table(rows: list[dict[str, Any]], path: Path) -> None:
    """The scores as a Markdown table, a row a model; nothing where there are none."""
    names = list(rows[0]["tasks"]) if rows else []
    if not names:
        return
    lines = [["model", *names], ["---"] * (len(names) + 1)]
    lines += [[row["model"], *(f"{row['tasks'][name]:.4f}" for name in names)] for row in rows]
    with whole_file(path) as partial:
        partial.write_text("".join(f"| {' | '.join(line)} |\n" for line in lines), encoding="utf-8")
