"""Import of a recipe's plugins: the user's own modules, which add to the registries."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

from ..errors import MinitronError, RecipeError

__all__ = ["import_plugins"]


def import_plugins(names: Iterable[object], folder: Path) -> None:
    """Import modules by name, from the recipe's `folder` or from `sys.path`. This runs their code.

    A file in `folder` comes before one of the same name elsewhere. Raises RecipeError for a module that is not there,
    whose import fails, or of whose name another file is imported already.
    """
    here = str(folder.resolve())
    if here not in sys.path:
        sys.path.append(here)  # for what a plugin imports later
    sys.path.insert(0, here)
    try:
        for name in names:
            _import(str(name), folder)
    finally:
        sys.path.remove(here)


def _import(name: str, folder: Path) -> None:
    try:
        module = import_module(name)
    except MinitronError:
        raise
    except Exception as error:  # a plugin raises anything
        missing = isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}.")
        cause = f"is not in {folder} or on sys.path" if missing else f"cannot be imported: {_told(error)}"
        raise RecipeError(f"the module {name!r} of plugins {cause}. Correct it, or remove it.") from error
    place, imported = folder.joinpath(*name.split(".")), getattr(module, "__file__", None)
    beside = next((each for each in (place.with_suffix(".py"), place / "__init__.py") if each.is_file()), None)
    if beside and (imported is None or Path(imported).read_bytes() != beside.read_bytes()):
        raise RecipeError(
            f"the module {name!r} of plugins is {beside}, but {imported or 'a module built into Python'} is imported "
            "under that name already. Rename yours."
        )


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".rstrip(".: ")
