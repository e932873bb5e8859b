"""Parse YAML into a plain tree; ambiguous or unboundedly growing YAML is refused."""

from __future__ import annotations

import math
import re
from collections.abc import Hashable

import yaml

from ..errors import RecipeError

__all__ = ["Tree", "read_yaml"]

Tree = None | bool | int | float | str | list["Tree"] | dict[str, "Tree"]
"""Value of a YAML text."""

MOST_NODES, DEEPEST = 100_000, 64
"""Limits of a tree with every alias expanded. The largest recipe has about a hundred nodes."""


class _Loader(yaml.SafeLoader):
    """YAML loader with YAML 1.2's numbers, no dates, and an error for a duplicate key."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+)",
    "tag:yaml.org,2002:float": r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)"
    r"|\.(?:nan|NaN|NAN)",
}
"""YAML 1.1's octal `010` (ten here) and sexagesimal `1:30` (text here) are left out."""
DATE = "tag:yaml.org,2002:timestamp"

_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (*NUMBERS, DATE)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for tag, pattern in NUMBERS.items():
    _Loader.add_implicit_resolver(tag, re.compile(rf"(?:{pattern})$"), list("-+.0123456789"))


def read_yaml(text: str) -> Tree:
    """Return a YAML text as dicts with text keys, lists and scalars; no two places share an object.

    Raises RecipeError for text that is not YAML, a key given twice, a number that is infinite, NaN or thousands of
    digits long, text that no file can hold, and a tree too large or too deep.
    """
    try:
        tree = yaml.load(text, _Loader)
    except RecursionError as error:
        raise RecipeError("it is nested too deeply. Write it flatter.") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number of thousands of digits
        raise RecipeError(f"it is not YAML: {' '.join(str(error).split())}.") from error
    return _Copier().copy(tree, ())


class _Copier:
    """Copies a tree with aliases expanded, and counts its nodes."""

    def __init__(self) -> None:
        self._nodes = 0

    def copy(self, node: object, place: tuple[str, ...]) -> Tree:
        self._nodes += 1
        if self._nodes > MOST_NODES or len(place) > DEEPEST:
            raise RecipeError(
                f"it has more than {MOST_NODES:,} values or {DEEPEST} levels, with aliases expanded. Make it smaller."
            )
        if isinstance(node, dict):
            if odd := [key for key in node if not isinstance(key, str)]:
                raise RecipeError(f"{_name(place)} has the key {odd[0]!r}, which is not text. Put it in quotes.")
            return {_text(key, place): self.copy(value, (*place, key)) for key, value in node.items()}
        if isinstance(node, list):
            return [self.copy(value, (*place, str(number))) for number, value in enumerate(node)]
        if isinstance(node, str):
            return _text(node, place)
        if isinstance(node, float) and not math.isfinite(node):
            raise RecipeError(f"{_name(place)} is {node}. Give a finite number.")
        if node is not None and not isinstance(node, int | float):
            raise RecipeError(f"{_name(place)} is a {type(node).__name__}. Give text, a number, a list or keys.")
        return node


def _text(text: str, place: tuple[str, ...]) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecipeError(
            f"{_name(place)} holds half of a surrogate pair, which no file can hold. Write the whole character."
        ) from error
    if "\0" in text:
        raise RecipeError(f"{_name(place)} holds a NUL character. Remove it.")
    return text


def _name(place: tuple[str, ...]) -> str:
    return ".".join(place) or "the recipe"
