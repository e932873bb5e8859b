"""The command `rehearse`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .gc_tuning import restore_gc
from .interrupt import raise_if_interrupted
from .options import Out, RecipePath, Set

__all__ = ["rehearse"]


def rehearse(
    recipe: RecipePath,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="Number of GPUs of the cluster.")],
    overrides: Set = None,
    out: Out = None,
    gpu: Annotated[str, typer.Option("--gpu", help="GPU of the data sheet: A100, H100, H200, B200, ...")] = "H100",
    memory: Annotated[
        float, typer.Option("--memory", min=0.001, help="GiB per GPU; a peak above it is an error.")
    ] = 80.0,
    stage: Annotated[str, typer.Option("--stage", help="correct, score, distill or evaluate.")] = "distill",
    report: Annotated[
        Path | None, typer.Option("--report", metavar="DIR", help="Also write a page with plots, and all numbers.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the tables.")] = False,
) -> None:
    """Rehearse a stage on every kind of rank of a cluster. Needs no GPU and no weights; all numbers are modelled."""
    import json

    from ..recipe import load_recipe
    from ..rehearsal import advice, smallest_change
    from ..rehearsal import rehearse as on_every_kind
    from ..report import rehearsal_tables, write_rehearsal

    loaded = load_recipe(recipe, overrides or (), out)
    restore_gc()
    found = on_every_kind(loaded, gpus=gpus, gpu=gpu, memory=memory, stage=stage, listener=raise_if_interrupted)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
    else:
        for table in rehearsal_tables(found.as_dict()):
            Console().print(table)
    if report:
        Console(stderr=True).print(f"report: {write_rehearsal(found.detailed(), report)}")
    if not found.fits:
        found.expect_to_fit(advice(smallest_change(loaded, found, raise_if_interrupted)))
