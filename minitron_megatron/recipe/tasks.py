"""The tasks that the recipe names, on a model of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data import transformers_tokenizer
from ..evaluate import Run, Task, run_tasks, scores_of
from ..files import whole_file, write_json
from .context import Context

__all__ = ["WINOGRANDE", "evaluate_tasks", "winogrande", "write_table"]

WINOGRANDE = Task("winogrande", 5, "acc")
"""As the second paper chooses layers by it."""


def evaluate_tasks(context: Context, model: Any, name: str) -> dict[str, float]:
    """Task -> score; the harness's own results go to `evaluation/<name>.json`. Collective over the world."""
    tasks = context.recipe.evaluate.wanted()
    if not tasks:
        return {}
    found = _run(context, model, tasks)
    if context.topology.rank == 0:
        write_json(context.folders.evaluation / f"{name}.json", found)
    return scores_of(found, tasks)


def winogrande(context: Context, model: Any, run: Run) -> float:
    """Accuracy of what `run` runs of a model. Collective over the world."""
    return scores_of(_run(context, model, [WINOGRANDE], run), [WINOGRANDE])[WINOGRANDE.name]


def _run(context: Context, model: Any, tasks: list[Task], run: Run | None = None) -> dict[str, Any]:
    keys = context.recipe.evaluate
    return run_tasks(
        model,
        tasks,
        transformers_tokenizer(context.recipe.model),
        context.topology,
        files=keys.task_files,
        limit=keys.limit,
        truncate=keys.truncate,
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
