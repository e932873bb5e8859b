"""The command `rehearse`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from .gc_tuning import restore_gc
from .interrupt import raise_if_interrupted
from .options import Out, RecipePath, Set

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..rehearsal import Rehearsal

__all__ = ["rehearse"]


def rehearse(
    recipe: RecipePath,
    gpus: Annotated[int, typer.Option("--gpus", metavar="N", min=1, help="Number of GPUs of the cluster.")],
    overrides: Set = None,
    out: Out = None,
    gpu: Annotated[
        str, typer.Option("--gpu", metavar="NAME", help="GPU of the data sheet: A100, H100, H200, B200, ...")
    ] = "H100",
    memory: Annotated[
        float, typer.Option("--memory", metavar="GIB", min=0.001, help="GiB per GPU; a peak above it is an error.")
    ] = 80.0,
    stage: Annotated[
        str,
        typer.Option(
            "--stage", metavar="NAME", help="correct, score, search, prune, distill, evaluate, generate or export."
        ),
    ] = "distill",
    report: Annotated[
        Path | None, typer.Option("--report", metavar="DIR", help="Also write a page with plots, and all numbers.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the tables.")] = False,
) -> None:
    """Rehearse a stage on every kind of rank of a cluster. Needs no GPU and no weights; all numbers are modelled."""
    import json

    from ..forecast import runs_of
    from ..recipe import load_recipe
    from ..rehearsal import rehearse as on_every_kind
    from ..report import write_rehearsal

    loaded = load_recipe(recipe, overrides or (), out)
    results: dict[str, tuple[Recipe, Rehearsal]] = {}
    restore_gc()
    for run in runs_of(loaded):
        if run.until is not None:  # it only prunes
            continue
        keys = run.planned
        found = on_every_kind(keys, gpus=gpus, gpu=gpu, memory=memory, stage=stage, listener=raise_if_interrupted)
        results[run.name] = keys, found
        if not as_json:
            _print(found, run.name if loaded.family else "")
        if report:
            folder = report / run.name if loaded.family else report
            Console(stderr=True).print(f"report: {write_rehearsal(found.detailed(), folder)}")
    if as_json:
        tree = {name: found.as_dict() for name, (_, found) in results.items()}
        print(json.dumps(tree if loaded.family else next(iter(tree.values())), indent=2))
    for keys, found in results.values():
        if not found.fits:
            found.expect_to_fit(_advice(keys, found))


def _print(found: Rehearsal, student: str) -> None:
    """student: its name in a family."""
    from ..report import rehearsal_tables

    if student:
        print(f"{student}:")
    for table in rehearsal_tables(found.as_dict()):
        Console().print(table)


def _advice(recipe: Recipe, found: Rehearsal) -> str:
    from ..rehearsal import advice, smallest_change

    return advice(smallest_change(recipe, found, raise_if_interrupted))
