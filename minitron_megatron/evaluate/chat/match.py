"""Rules by which BFCL compares function calls with their true answers: abstract syntax, not results.

Types are strict (1 is no float in a list, True no integer), strings are compared without case, spaces and some signs,
and a true answer lists the values that each argument may have; "" among them: the argument may be missing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .calls import Call

__all__ = ["TYPES", "Function", "Truth", "all_match", "plain_name"]

Function = Mapping[str, Any]
"""Description of a function in BFCL's form: `name`, and `parameters` with `properties` and `required`."""
Truth = Mapping[str, Mapping[str, Sequence[object]]]
"""Function -> argument -> allowed values."""

TYPES: Mapping[str, type] = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
}
"""Type of a parameter in BFCL's words -> type of its value; JSON makes a tuple a list."""
LISTS = ("array", "tuple")
IGNORED = re.compile(r"[ ,./\-_*^]")
"""Characters that do not count in strings."""


def plain_name(name: str) -> str:
    """Return a function's name as chat templates may write it: without dots."""
    return name.replace(".", "_")


def all_match(calls: Sequence[Call], truths: Sequence[Truth], functions: Sequence[Function]) -> bool:
    """Return whether the calls are the true ones, in any order and none besides."""
    if len(calls) != len(truths):
        return False
    rest = list(calls)
    for truth in truths:
        ((name, allowed),) = truth.items()
        function = next(each for each in functions if each["name"] == name)
        found = next((call for call in rest if _matches(call, function, allowed)), None)
        if found is None:
            return False
        rest.remove(found)
    return True


def _matches(call: Call, function: Function, allowed: Mapping[str, Sequence[object]]) -> bool:
    name, arguments = call
    parameters = function["parameters"]
    if plain_name(name) != plain_name(function["name"]) or not set(parameters.get("required", ())) <= arguments.keys():
        return False
    if any(argument not in parameters["properties"] or argument not in allowed for argument in arguments):
        return False
    if any(key not in arguments and "" not in values for key, values in allowed.items()):
        return False
    return all(_fits(value, parameters["properties"][key], allowed[key]) for key, value in arguments.items())


def _fits(value: object, parameter: Function, allowed: Sequence[object]) -> bool:
    """Return whether an argument has the parameter's type and one of the allowed values."""
    kind, wanted = parameter["type"], TYPES[parameter["type"]]
    inner = TYPES[parameter["items"]["type"]] if kind in LISTS else None
    if kind == "tuple" and isinstance(value, tuple):
        value = list(value)
    if kind == "float" and type(value) is int:
        value = float(value)
    usual = _first_type(allowed)
    if type(value) is wanted:
        if inner is not None and not any(_all_of_type(value, inner, each) for each in allowed):
            return False
    elif type(value) is not usual:
        return False
    if type(value) is not wanted or usual not in (wanted, None):
        return value in allowed  # the true answer is not of the parameter's type, as for the name of a variable
    if isinstance(value, dict):
        return any(isinstance(each, dict) and _dict_fits(value, each) for each in allowed)
    if isinstance(value, list) and inner is dict:
        return any(_dicts_fit(value, each) for each in allowed)
    if isinstance(value, str):
        return _standard(value) in map(_standard, allowed)
    if isinstance(value, list):
        return _standard_list(value) in [_standard_list(each) for each in allowed if isinstance(each, list | str)]
    return value in allowed


def _first_type(allowed: Sequence[object]) -> type | None:
    return next((type(each) for each in allowed if each != ""), None)


def _all_of_type(values: Any, kind: type, allowed: object) -> bool:
    """Return whether all elements of a list have its type, or that of the elements of an allowed list."""
    if not isinstance(allowed, list):
        return True
    return all(type(value) in (kind, _first_type(allowed)) for value in values)


def _dict_fits(value: Mapping[str, object], allowed: Mapping[str, Sequence[object]]) -> bool:
    if any(key not in value and "" not in values for key, values in allowed.items()):
        return False
    return all(key in allowed and _standard(each) in map(_standard, allowed[key]) for key, each in value.items())


def _dicts_fit(value: Sequence[object], allowed: object) -> bool:
    if not isinstance(allowed, list | str) or len(value) != len(allowed):
        return False
    return all(
        isinstance(each, dict) and isinstance(right, dict) and _dict_fits(each, right)
        for each, right in zip(value, allowed, strict=True)
    )


def _standard(value: object) -> object:
    return IGNORED.sub("", value).lower().replace("'", '"') if isinstance(value, str) else value


def _standard_list(values: Sequence[object]) -> list[object]:
    return [_standard(each) for each in values]
