"""Load recipes from YAML, with errors in the user's terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import RecipeError
from .key_names import nearest_key
from .schema import Recipe, json_schema
from .yaml_tree import read_yaml

__all__ = ["load_recipe"]

MOST_BYTES = 10 * 2**20
WANTED: Mapping[str, str] = {
    "tuple_type": "give a list",
    "dict_type": "give a block of keys",
    "model_type": "give a block of keys",
    "bool_type": "give true or false",
    "int_type": "give a whole number",
    "int_parsing": "give a whole number",
    "int_parsing_size": "give a smaller number",
    "int_from_float": "give a whole number",
    "float_type": "give a number",
    "float_parsing": "give a number",
    "finite_number": "give a finite number",
    "string_type": "give text",
    "path_type": "give a path",
    "too_short": "give at least one",
    "string_too_short": "give some text",
}
"""pydantic error type -> advice, for the types whose own message speaks of Python types."""


def load_recipe(path: Path, overrides: Sequence[str] = (), out: Path | None = None) -> Recipe:
    """Read a YAML recipe; `overrides` are `a.b=value` with YAML values. Raises RecipeError in the user's terms."""
    try:
        if path.is_file() and path.stat().st_size > MOST_BYTES:
            raise RecipeError(f"recipe {path} is larger than {MOST_BYTES >> 20} MiB. Pass a recipe file.")
        raw = read_yaml(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path} is not YAML: it is not UTF-8 at byte {error.start}.") from error
    except RecipeError as error:
        raise RecipeError(f"recipe {path}: {str(error).removeprefix(f'recipe {path} ')}") from error
    if not isinstance(raw, dict):
        raise RecipeError(f"recipe {path} is not a mapping of keys. Start from `minitron init MODEL`.")
    for override in overrides:
        raw = _override(raw, override)
    if out is not None:
        raw["out"] = str(out)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise RecipeError(f"recipe {path}: {_explain(error)}") from error


def _override(raw: dict[str, Any], text: str) -> dict[str, Any]:
    """Return `raw` with one `a.b=value` override applied."""
    key, equals, written = text.partition("=")
    if not equals or not all(key.split(".")):
        raise RecipeError(f"--set {_short(text)} does not have the form a.b=value.")
    try:
        value = read_yaml(written)
    except RecipeError as error:
        raise RecipeError(f"--set {_short(text)}: {_short(written)} is not a YAML value: {error}") from error
    return _replaced(raw, key.split("."), value, text)


def _replaced(node: Any, path: Sequence[str], value: Any, text: str) -> dict[str, Any]:
    """Return a copy of `node` with the value at `path` replaced."""
    first, *rest = path
    if node is not None and not isinstance(node, dict):
        raise RecipeError(f"--set {_short(text)}: the parent of {first} is a value, not a block of keys.")
    block = node or {}
    return {**block, first: _replaced(block.get(first), rest, value, text) if rest else value}


def _explain(error: ValidationError) -> str:
    """Return the first problem, with a suggestion for an unknown key, and the number of further problems."""
    problems = error.errors(include_url=False)
    first = min(problems, key=lambda each: each["type"] != "extra_forbidden")  # an unknown key often causes the others
    where, value = ".".join(str(part) for part in first["loc"]), first["input"]
    if first["type"] == "extra_forbidden":
        text = f"{where} is not a known key.{nearest_key(first['loc'], _schema())}"
    elif first["type"] == "missing":
        text = f"{where} is missing."
    else:
        message = WANTED.get(first["type"], first["msg"].removeprefix("Value error, ").removeprefix("Input "))
        if where and not isinstance(value, dict):
            text = f"{where} is {_short(value)}: {message[0].lower()}{message[1:]}."
        else:
            text = f"{where}: {message}.".removeprefix(": ")
    return text + (f" ({len(problems) - 1} more errors.)" if len(problems) > 1 else "")


def _short(value: Any) -> str:
    """Return a value as YAML writes it, shortened to 100 characters."""
    plain = value is None or isinstance(value, bool)
    text = str(value).lower().replace("none", "null") if plain else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


@cache
def _schema() -> dict[str, Any]:
    return json_schema()
