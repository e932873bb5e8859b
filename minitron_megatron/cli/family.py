"""A recipe with a family: its runs, one after another, and the page that compares its students."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .printing import print_comparison, print_dry_run
from .running import carry_out

if TYPE_CHECKING:
    from ..parallel import Topology
    from ..recipe import Recipe

__all__ = ["print_steps", "run_family"]


def run_family(recipe: Recipe, topology: Topology) -> None:
    """Run every run of a family that is not done, and compare its students. Collective over the world."""
    from ..forecast import check_family, family_runs
    from ..run import SharedStages

    runs = family_runs(recipe)
    check_family(runs, topology)
    for number, run in enumerate(runs, 1):
        if topology.rank == 0:
            print(f"run {number} of {len(runs)}: {run.name}", flush=True)
        carry_out(run.recipe, topology, until=run.until, shared=SharedStages(recipe.out / "shared"))
    if topology.rank == 0:
        print_comparison([run.recipe.out for run in runs if run.until is None], recipe.out)


def print_steps(path: Path, overrides: list[str] | None, out: Path | None) -> None:
    """Print what `run` would do with a recipe or its family, on the first of the launched processes."""
    from ..parallel import launched
    from ..recipe import load_recipe

    if launched("RANK", 0) == 0:
        recipe = load_recipe(path, overrides or (), out)
        _print_family_steps(recipe) if recipe.family else print_dry_run(recipe)


def _print_family_steps(recipe: Recipe) -> None:
    """Print what each run of a family would do."""
    from ..forecast import family_runs
    from ..run import wanted

    for run in family_runs(recipe):
        print(f"{run.name}:")
        if all((place / "config.json").is_file() or place == recipe.model for place in run.recipe.models.values()):
            print_dry_run(run.recipe, until=run.until)
            continue
        for stage in wanted(run.recipe):
            print(f"{stage.name:<10} run: its model is not made yet")
            if stage.name == run.until:
                break
