"""Load recipes from YAML, with errors in the user's terms."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from ..errors import RecipeError
from ..settings import explain
from ..wrong_values import shown
from .key_names import nearest_key
from .plugins import import_plugins
from .schema import Recipe
from .yaml_tree import Tree, read_yaml

__all__ = ["load_recipe", "recipe_with"]

MOST_BYTES = 10 * 2**20


def load_recipe(path: Path, overrides: Sequence[str] = (), out: Path | None = None) -> Recipe:
    """Read a YAML recipe; `overrides` are `a.b=value` with YAML values. Raises RecipeError in the user's terms.

    Imports the recipe's plugins first, which may add the names that it uses.
    """
    try:
        if path.is_file() and path.stat().st_size > MOST_BYTES:
            raise RecipeError(f"it is larger than {MOST_BYTES >> 20} MiB. Give a recipe, which is a small YAML file.")
        raw = read_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path} is not UTF-8 at byte {error.start}. Save the file as UTF-8.") from error
    except RecipeError as error:
        raise RecipeError(f"recipe {path}: {error}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"recipe {path} is not a mapping of keys. Start from `minitron init MODEL`.")
    for override in overrides:
        raw = _override(raw, override)
    if out is not None:
        raw["out"] = str(out)
    try:
        if isinstance(plugins := raw.get("plugins"), list):
            import_plugins(plugins, path.parent)
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(f"recipe {path}: {explain(error, nearest_key)}") from error
    except RecipeError as error:
        raise RecipeError(f"recipe {path}: {error}") from error


def recipe_with(recipe: Recipe, changes: Mapping[str, Tree], *, without: Collection[str] = ()) -> Recipe:
    """Return a recipe with the values of some keys (with dots) changed, and without some keys of its first level.

    Raises RecipeError, as for the recipe's own keys.
    """
    given: dict[str, Tree] = recipe.model_dump(mode="json", exclude_unset=True)
    raw = {key: value for key, value in given.items() if key not in without}
    for key, value in changes.items():
        raw = _changed(raw, key, value, key)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(explain(error, nearest_key)) from error


def _override(raw: dict[str, Tree], text: str) -> dict[str, Tree]:
    """Return `raw` with one `a.b=value` override applied."""
    key, equals, written = text.partition("=")
    if not equals or not all(key.split(".")):
        raise RecipeError(f"--set {shown(text)} does not have the form a.b=value.")
    try:
        value = read_yaml(written)
    except RecipeError as error:
        raise RecipeError(f"--set {shown(text)}: {shown(written)} is not a YAML value: {error}") from error
    return _changed(raw, key, value, f"--set {shown(text)}")


def _changed(raw: dict[str, Tree], key: str, value: Tree, where: str) -> dict[str, Tree]:
    """Return a copy of `raw` with the value of a key (with dots) replaced. where: begins the message of an error."""
    first, *rest = key.split(".")
    return {**raw, first: _replaced(raw.get(first), rest, value, where)}


def _replaced(node: Tree, path: Sequence[str], value: Tree, where: str) -> Tree:
    """Return a copy of `node` with the value at `path` replaced; a number is the place in a list, from 0."""
    if not path:
        return value
    first, *rest = path
    if isinstance(node, list):
        if first not in map(str, range(len(node))):
            raise RecipeError(f"{where}: the list has no entry {first}. Use 0 to {len(node) - 1}.")
        at = int(first)
        return [*node[:at], _replaced(node[at], rest, value, where), *node[at + 1 :]]
    if node is not None and not isinstance(node, dict):
        raise RecipeError(f"{where}: the parent of {first} is a value, not a block of keys. Correct the key.")
    block = node or {}
    return {**block, first: _replaced(block.get(first), rest, value, where)}
