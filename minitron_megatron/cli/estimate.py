"""The command `estimate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from .. import numbers
from .gc_tuning import restore_gc
from .interrupt import raise_if_interrupted

__all__ = ["print_estimate", "print_plan"]

PREDICTED = "predicted by formula"
"""Label of an estimate's numbers."""
PLAN = ("layout", "step, formula", "rehearsed", "of peak", "memory", "time")
RUNS = ("run", "parameters", "tokens", "FLOPs", "time")


def print_estimate(
    path: Path,
    overrides: Sequence[str],
    out: Path | None,
    *,
    gpus: int | None,
    mfu: float,
    memory: float,
    slurm: bool,
) -> None:
    """Print the costs of a recipe, or of each run of its family; with `slurm` only the lines that submit it.

    Raises TopologyError where a rank needs more than `memory` GiB.
    """
    from ..forecast import estimate, estimate_family, slurm_commands
    from ..recipe import load_recipe
    from ..report import candidates_table, memory_table, pairs_table, text_table

    recipe, console = load_recipe(path, overrides, out), Console()
    family = estimate_family(recipe, gpus=gpus, mfu=mfu) if recipe.family else None
    found = family.whole() if family else estimate(recipe, gpus=gpus, mfu=mfu)
    if slurm:
        found.expect_to_fit(memory)
        arguments = [part for each in overrides for part in ("--set", each)] + (["--out", str(out)] if out else [])
        print(slurm_commands(path, arguments, found), end="")
        return
    if family:
        console.print(text_table(f"family of {recipe.model} ({PREDICTED})", RUNS, family.rows()))
        console.print(family.summary(), highlight=False)
    else:
        console.print(pairs_table(f"{path} ({PREDICTED})", found.rows()))
    console.print(memory_table(f"Memory by kind, without activations ({PREDICTED})", found.rank_rows()))
    if found.candidates and not family:
        console.print(candidates_table(found.candidate_rows(), PREDICTED))
    found.expect_to_fit(memory)


def print_plan(path: Path, overrides: Sequence[str], out: Path | None, *, gpus: int | None, memory: float) -> None:
    """Print the layouts of a recipe's distillation that were rehearsed, the fastest first, and its keys."""
    from ..errors import RecipeError
    from ..forecast import runs_of
    from ..recipe import load_recipe
    from ..rehearsal import plan_layouts
    from ..report import Progress, fan_out, text_table

    if gpus is None:
        raise RecipeError("--plan needs the number of GPUs. Give it with --gpus.")
    recipe = load_recipe(path, overrides, out)
    restore_gc()
    for run in runs_of(recipe):
        if run.until is not None:  # it only prunes
            continue
        with Progress() as progress:
            listener = fan_out(raise_if_interrupted, progress)
            found = plan_layouts(run.planned, gpus=gpus, memory=memory, listener=listener)
        rows = [
            [
                str(each.layout),
                f"{each.by_formula:.2f} s",
                f"{each.found.seconds:.2f} s",
                f"{each.found.utilisation:.0%}",
                numbers.size(each.found.worst.peak),
                numbers.duration(3600 * each.found.hours),
            ]
            for each in found
        ]
        title = f"{run.name}: distillation on {gpus} H100 GPUs (modelled, not measured)"
        Console().print(text_table(title, PLAN, rows))
        print(found[0].layout.block(), end="")
