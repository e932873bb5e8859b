"""Check the run folder of a recipe before work begins."""

from __future__ import annotations

import os
from pathlib import Path

from ..data import places
from ..errors import RecipeError
from ..recipe import Recipe

__all__ = ["check_paths"]


def check_paths(recipe: Recipe, *, must_be_writable: bool) -> None:
    """Raise RecipeError unless the run folder is or can become a folder, separate from the run's inputs."""
    _check_out(recipe.out, must_be_writable=must_be_writable)
    _check_separate(recipe)


def _check_out(out: Path, *, must_be_writable: bool) -> None:
    """Check that the run folder is one, or can become one."""
    found = next(path for path in (out.absolute(), *out.absolute().parents) if os.path.lexists(path))
    if not found.is_dir():
        what = "a link to nowhere" if found.is_symlink() and not found.exists() else "not a folder"
        raise RecipeError(f"out is {out}, but {found} is {what}. Give another path, or remove it.")
    if must_be_writable and not out.exists() and not os.access(found, os.W_OK | os.X_OK):
        raise RecipeError(f"out is {out}, which cannot be made: {found} is not writable. Give another path.")


def _check_separate(recipe: Recipe) -> None:
    """Check that the run folder is separate from the run's inputs, so that their files cannot be confused."""
    out = recipe.out.resolve()
    read = [("model", recipe.model), ("student", recipe.student), ("distill.start", recipe.distill.start)]
    read += [("data.sources", path) for source in recipe.data.sources for path in places(source.paths)]
    read += [("data.sources", path) for source in recipe.data.sources for path in places(source.held_out_paths)]
    read += [("score.sources", path) for source in recipe.score.sources for path in places(source.paths)]
    for key, path in read:
        if path is None:
            continue
        there = path.resolve()
        if out == there or (there.is_dir() and there in out.parents):
            raise RecipeError(f"out is {recipe.out}, which is inside {path} ({key}). Give a separate folder.")
        if out in there.parents and key.endswith(".sources"):
            raise RecipeError(f"{path} ({key}) is inside the run folder {recipe.out}. Move one of them.")
