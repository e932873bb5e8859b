"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["Out", "RecipePath", "Set"]

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="a.b=c", help="Override a recipe key; repeatable.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Run folder, instead of the recipe's.")]
