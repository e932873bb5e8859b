"""Recipes from YAML, and what is wrong with one in the user's words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import RecipeError, did_you_mean
from .schema import Recipe, json_schema

__all__ = ["load_recipe"]


def load_recipe(path: Path, overrides: Sequence[str] = (), out: Path | None = None) -> Recipe:
    """Reads a YAML recipe; `overrides` are `a.b=value` with YAML values. Raises RecipeError in the user's words."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {path} is not YAML: {' '.join(str(error).split())}.") from error
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
    """`raw` with one `a.b=value` said anew."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RecipeError(f"--set {text!r} is not of the form a.b=value.")
    try:
        return _replaced(raw, key.split("."), yaml.safe_load(value), text)
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {text!r}: {value!r} is not a YAML value.") from error


def _replaced(node: Any, path: Sequence[str], value: Any, text: str) -> dict[str, Any]:
    """A copy with the value at `path` replaced: blocks that YAML aliases share must not change together."""
    first, *rest = path
    if node is not None and not isinstance(node, dict):
        raise RecipeError(f"--set {text!r}: there is no block of keys that holds {first}.")
    block = node or {}
    return {**block, first: _replaced(block.get(first), rest, value, text) if rest else value}


def _explain(error: ValidationError) -> str:
    """The first thing wrong, with the nearest name for an unknown key, and how many more there are."""
    problems = error.errors()
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = _known_keys(first["loc"][:-1])
        text = f"{where} is not a known key.{did_you_mean(str(first['loc'][-1]), known)}"
    elif first["type"] == "missing":
        text = f"{where} is missing."
    else:
        message = first["msg"].removeprefix("Value error, ")
        value = f"{where} is {first['input']!r}: {message[0].lower()}{message[1:]}."
        text = value if where and not isinstance(first["input"], dict) else f"{where}: {message}.".removeprefix(": ")
    return text + (f" ({len(problems) - 1} more like this.)" if len(problems) > 1 else "")


def _known_keys(place: Sequence[int | str]) -> list[str]:
    """The keys that the schema has at a place in the tree."""
    schema = json_schema()
    at: Mapping[str, Any] = schema
    for part in place:
        at = _resolve(at["items"] if isinstance(part, int) else at["properties"][part], schema)
    return list(at.get("properties", ()))


def _resolve(node: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Follows references and the non-null side of an optional block."""
    for choice in node.get("anyOf", ()):
        if "$ref" in choice:
            node = choice
    if "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    return node
