"""The command `estimate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

__all__ = ["print_estimate"]

PREDICTED = "predicted by formula"
"""Label of an estimate's numbers."""
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
