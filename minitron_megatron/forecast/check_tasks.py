"""Check the tasks of a recipe before work begins."""

from __future__ import annotations

from pathlib import Path

from ..errors import RecipeError
from ..evaluate import NEED_JUDGE, Task, check_tasks
from ..recipe import Recipe
from ..score import DEPTH_METRICS

__all__ = ["check_evaluation", "settings_folder"]


def check_evaluation(recipe: Recipe, folder: Path | None = None, *, counts_only: bool = False) -> None:
    """Check the tasks of `evaluate` and the one of `score.depth`. Raises MinitronErrors.

    folder: the model that runs them; None: the recipe's model. counts_only: the recipe will not run on this machine, so
    that the API key of a judge is not required.
    """
    _check_judge(recipe, counts_only)
    keys, depth = recipe.evaluate, recipe.score.depth and DEPTH_METRICS[recipe.score.depth.metric].task
    tokenizer = recipe.model if any(recipe.model.glob("tokenizer*")) else None  # an estimate needs none
    for tasks in (keys.wanted(), [depth] if isinstance(depth, Task) else []):
        if tasks:
            check_tasks(
                tasks,
                keys.task_files,
                run_code=keys.run_code,
                tokenizer=tokenizer,
                model=settings_folder(recipe, folder or recipe.model),
                chat=keys.chat,
                truncate=keys.truncate,
                judge=keys.judge,
            )


def _check_judge(recipe: Recipe, counts_only: bool) -> None:
    keys = recipe.evaluate
    if keys.judge is not None and not counts_only:
        keys.judge.key()
    if keys.judge is None and recipe.search and recipe.search.choose in NEED_JUDGE:
        raise RecipeError(
            f"search.choose is {recipe.search.choose}, whose answers have no score without a judge. "
            "Set evaluate.judge, or choose by another task."
        )


def settings_folder(recipe: Recipe, folder: Path) -> Path:
    """Return the folder to read generation settings from: `folder`, or the recipe's model if it has none."""
    return folder if (folder / "generation_config.json").is_file() else recipe.model
