"""Check that what a run reads and what it writes, and what it trains on and what it holds out, are separate files."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..data import input_files, most_bytes, places
from ..errors import DataError, RecipeError
from ..recipe import Recipe

__all__ = ["check_places"]

Files = set[Path]
"""Real paths of a source's files."""


def check_places(recipe: Recipe) -> None:
    """Raise a MinitronError for text that is not there, is empty, or lies where it would be confused with other."""
    data, score = recipe.data.sources, recipe.score.sources
    training, held_out = [source.paths for source in data], [source.held_out_paths for source in data]
    calibration = [source.paths for source in score]
    _check_run_folder(recipe, {"data.sources": [*training, *held_out], "score.sources": calibration})
    _check_overlaps(*(list(map(_files, texts)) for texts in (training, held_out, calibration)))


def _check_run_folder(recipe: Recipe, texts: Mapping[str, Sequence[Sequence[str]]]) -> None:
    """Check that the run folder is separate from the run's inputs. texts: places of text by the key that names them."""
    out = recipe.out.resolve()
    read = [("model", recipe.model), ("student", recipe.student), ("distill.start", recipe.distill.start)]
    read += [(key, path) for key, sources in texts.items() for named in sources for path in places(named)]
    for key, path in read:
        if path and (out == (there := path.resolve()) or (there.is_dir() and there in out.parents)):
            raise RecipeError(f"out is {recipe.out}, which is inside {path} ({key}). Give a separate folder.")
    for key, sources in texts.items():
        for file in sorted(set().union(*map(_files, sources))):
            if out in file.parents:
                raise RecipeError(f"{file} ({key}) is inside the run folder {recipe.out}. Move one of them.")


def _check_overlaps(training: list[Files], held_out: list[Files], calibration: list[Files]) -> None:
    """Check that no held-out file is also training text or calibration text, and that no two sources share one."""
    for (number, one), (other, more) in itertools.combinations(enumerate(training), 2):
        if one & more:
            raise RecipeError(
                f"{min(one & more)} is in data.sources.{number} and in data.sources.{other}: what one holds out, the "
                "other would train on. Name it once, with the sum of the weights."
            )
    both = set().union(*training, *calibration) & set().union(*held_out)
    if both:
        raise RecipeError(
            f"{min(both)} is both training text and held-out text. Give other files in "
            "data.sources[].validation, or a share of the documents."
        )


def _files(named: Sequence[str]) -> Files:
    if named and not most_bytes(named):
        raise DataError(f"data source {', '.join(named)} is empty. Check data.sources.")
    return {file.resolve() for file in input_files(named)}
