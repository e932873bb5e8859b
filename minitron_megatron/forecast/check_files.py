"""Checks of the files that a recipe names: they are there, apart from the run folder, and held-out ones apart from
those that are trained on."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..data import input_files, most_bytes, places
from ..errors import DataError, RecipeError
from ..recipe import Recipe, SftRound

__all__ = ["check_files"]

Places = tuple[str, Sequence[str], Sequence[str]]
"""Key in the recipe, places that are trained or calibrated on, and held-out places."""


def check_files(recipe: Recipe, *, must_be_writable: bool) -> None:
    """Raise a MinitronError for a run folder that cannot be one, and for text that is not there, is empty, or lies
    where it would be confused with other. recipe: with models by the names that the user gave."""
    _check_out(recipe.out, must_be_writable=must_be_writable)
    _check_run_folder(recipe)
    _check_overlaps(recipe)


def _check_out(out: Path, *, must_be_writable: bool) -> None:
    """Check that the run folder is one, or can become one."""
    found = next(path for path in (out.absolute(), *out.absolute().parents) if os.path.lexists(path))
    if not found.is_dir():
        what = "a link to nowhere" if found.is_symlink() and not found.exists() else "not a folder"
        raise RecipeError(f"out is {out}, but {found} is {what}. Give another path, or remove it.")
    if must_be_writable and not out.exists() and not os.access(found, os.W_OK | os.X_OK):
        raise RecipeError(f"out is {out}, which cannot be made: {found} is not writable. Give another path.")


def _text(recipe: Recipe) -> Iterator[Places]:
    """Yield the places of all text, chats and pairs."""
    yield from (("data.sources", source.paths, source.held_out_paths) for source in recipe.data.sources)
    yield from (("score.sources", source.paths, ()) for source in recipe.score.sources)
    for number, keys in enumerate(recipe.align):
        block = "sources" if isinstance(keys, SftRound) else "pairs" if keys.pairs else "sample.prompts"
        yield f"align.{number}.{block}", keys.paths, keys.held_out_paths


def _check_run_folder(recipe: Recipe) -> None:
    """Check that the run folder is separate from the run's inputs."""
    out = recipe.out.resolve()
    models = {"model": recipe.model, "student": recipe.student, "distill.start": recipe.distill.start}
    read = [(key, path) for key, path in models.items() if path is not None]
    read += [(key, path) for key, paths, held_out in _text(recipe) for path in places([*paths, *held_out])]
    for key, path in read:
        there = path.resolve()
        if out == there or (there.is_dir() and there in out.parents):
            raise RecipeError(f"out is {recipe.out}, which is inside {path} ({key}). Give a separate folder.")
    for key, paths, held_out in _text(recipe):
        for file in sorted(_files(key, paths) | _files(_validation(key), held_out)):
            if out in file.parents:
                raise RecipeError(f"{file} ({key}) is inside the run folder {recipe.out}. Move one of them.")


def _check_overlaps(recipe: Recipe) -> None:
    """Check that no held-out file is also trained or calibrated on, and that no two sources share one."""
    own = [_files("data.sources", source.paths) for source in recipe.data.sources]
    for (number, one), (other, more) in itertools.combinations(enumerate(own), 2):
        if one & more:
            raise RecipeError(
                f"{min(one & more)} is in data.sources.{number} and in data.sources.{other}: what one holds out, the "
                "other would train on. Name it once, with the sum of the weights."
            )
    trained = set().union(*(_files(key, paths) for key, paths, _ in _text(recipe)))
    for key, _, held_out in _text(recipe):
        if both := trained & _files(_validation(key), held_out):
            raise RecipeError(
                f"{min(both)} is both training text and held-out text. Give other files in {_validation(key)}, or a "
                "share of the documents."
            )


def _validation(key: str) -> str:
    """Return the key of the held-out files that belong to the text of a key."""
    block = f"{key}[]" if key.endswith("sources") else key.rpartition(".")[0]
    return f"{block}.validation"


def _files(key: str, paths: Sequence[str]) -> set[Path]:
    """Return the real paths of a source's files. Raises DataError where it is empty."""
    if paths and not most_bytes(paths):
        raise DataError(f"data source {', '.join(paths)} is empty. Check {key}.")
    return {file.resolve() for file in input_files(paths)}
