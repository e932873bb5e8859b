"""Words for values of a wrong type. Settings and JSON files are checked by pydantic, whose own words name Python's
types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["EXPECTED", "is_unknown", "kind_of", "problem_in", "shown"]

EXPECTED = {
    "bool_type": "true or false",
    "dataclass_type": "a block of keys",
    "dict_type": "a block of keys",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_parsing_size": "a smaller number",
    "int_type": "a whole number",
    "is_instance_of": "a block of keys",
    "list_type": "a list",
    "model_attributes_type": "a block of keys",
    "model_type": "a block of keys",
    "none_required": "null",
    "path_type": "a path",
    "string_too_short": "some text",
    "string_type": "text",
    "too_short": "at least one",
    "tuple_type": "a list",
}
"""pydantic's type of an error -> what the value should be, where its own message speaks of Python's types."""

JSON_TYPES = {type(None): "null", bool: "a boolean", str: "text", list: "a list", dict: "an object", bytes: "binary"}

Problem = Mapping[str, Any]
"""An error of pydantic's ValidationError: its type, place, message and input."""


def kind_of(value: object) -> str:
    """Return a JSON value's type, for a message."""
    return JSON_TYPES.get(type(value), "a number")


def shown(value: object) -> str:
    """Return a value as YAML writes it, shortened to 100 characters."""
    plain = value is None or isinstance(value, bool)
    text = str(value).lower().replace("none", "null") if plain else repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def is_unknown(problem: Problem) -> bool:
    """Whether the problem is a key that does not belong there."""
    return problem["type"] in ("extra_forbidden", "unexpected_keyword_argument")


def problem_in(value: object, problems: Sequence[Problem]) -> str:
    """Return the first wrong place of a JSON value, what is there and what should be, and how many places are wrong.

    problems: of one place several, where it may have several types and has none of them.
    """
    places: dict[str, list[Problem]] = {}
    for each in problems:
        places.setdefault(_place(value, each), []).append(each)
    place, first = next(iter(places.items()))
    return _told(place or "it", first) + (f" (the first of {len(places)} wrong places)" if len(places) > 1 else "")


def _place(value: object, problem: Problem) -> str:
    """Return where the problem is: pydantic's place without the names of types between its keys."""
    at, parts = value, []
    for part in problem["loc"]:
        if (isinstance(at, dict) and part in at) or (isinstance(at, list) and isinstance(part, int) and part < len(at)):
            at = at[part]
        elif problem["type"] not in ("missing", "missing_argument") or part != problem["loc"][-1]:
            continue
        parts.append(str(part))
    return ".".join(parts)


def _told(place: str, problems: Sequence[Problem]) -> str:
    first = problems[0]
    if first["type"] in ("missing", "missing_argument"):
        return f"{place} is missing"
    if is_unknown(first):
        return f"{place} is not a known key"
    value = first["input"]
    found = kind_of(value) if isinstance(value, dict | list) else shown(value)
    known = [f"be {EXPECTED[each['type']]}" for each in problems if each["type"] in EXPECTED]
    message = first["msg"].removeprefix("Value error, ").rstrip(".")
    if not known and not message.startswith("Input should "):
        return f"{place} is {found}: {message[0].lower()}{message[1:]}"
    should = " or ".join(dict.fromkeys(known)).replace(" or be ", " or ") or message.removeprefix("Input should ")
    return f"{place} is {found}, and should {should}"
