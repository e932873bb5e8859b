"""Import of a recipe's plugins: the user's own modules, which add to the registries."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from ..errors import MinitronError, RecipeError

__all__ = ["import_plugins"]


def import_plugins(names: Iterable[object], folder: Path) -> None:
    """Import modules by name, from `sys.path` or from the recipe's `folder`. This runs their code.

    Raises RecipeError for a module that is not there, or whose import fails.
    """
    here = str(folder.resolve())
    for name in names:
        if here not in sys.path:
            sys.path.append(here)
        try:
            import_module(str(name))
        except MinitronError:
            raise
        except Exception as error:  # a plugin raises anything
            missing = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")
            cause = f"is not in {folder} or on sys.path" if missing else f"cannot be imported: {_told(error)}"
            raise RecipeError(f"the module {name!r} of plugins {cause}. Correct it, or remove it.") from error


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(".: ")
