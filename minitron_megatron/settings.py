"""Settings: one declaration for each, with its default, its range and its help.

A room declares its settings as a subclass of `Settings`; a recipe is a tree of them. The JSON Schema, the help and the
fingerprints derive from the fields: an attribute's docstring is its help, and a field marked `HowToRun` affects no
result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, cast, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic._internal._model_construction import ModelMetaclass  # it has no public name
from pydantic_core import ErrorDetails
from typing_extensions import dataclass_transform

from . import numbers
from .errors import RecipeError, did_you_mean
from .wrong_values import EXPECTED, shown

__all__ = [
    "MOST",
    "AddedLater",
    "AfterValidator",
    "BeforeValidator",
    "Count",
    "Field",
    "FilePath",
    "HowToRun",
    "NotNegative",
    "Positive",
    "Seed",
    "Settings",
    "Steps",
    "Text",
    "check_path",
    "explain",
    "model_validator",
]

SMALLEST, LARGEST = 2.0**-126, 2.0**128
"""Limits of a number's size, apart from 0, in fp32: beyond them it would become 0 or infinity in a computation."""
MOST = 2**63 - 1
"""The largest count: the maximum of an int64 index."""
LONGEST_NAME, LONGEST_PATH = 255, 4096
"""Linux's limits on a file name and a path, in bytes."""


def _whole(value: object) -> object:
    """Turn `94e9` (text in YAML) and `94.0e9` (a float) into the whole numbers they mean."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check_path(value: object) -> object:
    """Refuse paths that no file system accepts, and the empty path, which would mean the current folder."""
    if not isinstance(value, str | Path):
        raise ValueError("Give a path")
    try:
        text = str(value).encode()
    except UnicodeEncodeError as error:
        raise ValueError("Give a path whose name is UTF-8") from error
    if not text.strip() or b"\0" in text:
        raise ValueError("Give a path; this one is empty or contains a NUL character")
    if len(text) > LONGEST_PATH or any(len(name) > LONGEST_NAME for name in text.split(b"/")):
        raise ValueError(f"Give a path of at most {LONGEST_PATH} bytes, with each name at most {LONGEST_NAME} bytes")
    return value


Text = Annotated[str, Field(min_length=1)]
FilePath = Annotated[Path, BeforeValidator(check_path)]
Count = Annotated[int, BeforeValidator(_whole), Field(gt=0, le=MOST)]
Steps = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=MOST)]
Seed = Annotated[int, BeforeValidator(_whole), Field(ge=0, lt=2**32)]
"""Seed in the range that both numpy's and torch's generators accept."""
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


T = TypeVar("T")


class _HowToRun:
    """Mark of a field that does not affect results."""


HowToRun = Annotated[T, _HowToRun()]
"""A field that does not affect results, such as the layout. Every field without this mark does, and is part of the
fingerprint of the stages that read it."""


class _AddedLater:
    """Mark of a field that older runs do not have."""


AddedLater = Annotated[T, _AddedLater()]
"""A field that no fingerprint holds at its default, so that finished runs from before it was added stay done."""


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
class _Meta(ModelMetaclass):
    """Construction from Python: arguments by position as in a dataclass, and errors in the user's terms."""

    def __call__(cls, *values: object, **named: object) -> Any:
        fields = cast(type[BaseModel], cls).model_fields
        if len(values) > len(fields):
            raise TypeError(f"{cls.__name__} has {len(fields)} fields, and {len(values)} values were given")
        try:
            return super().__call__(**dict(zip(fields, values, strict=False)), **named)
        except ValidationError as error:
            raise RecipeError(explain(error, lambda place: did_you_mean(str(place[-1]), fields))) from error


class Settings(BaseModel, metaclass=_Meta):
    """A block of settings. Numbers fit in fp32, booleans are not accepted as numbers, and nothing changes later."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=False
    )

    def replaced(self, **changes: object) -> Self:
        """Return a copy with other values, validated again."""
        return type(self)(**{name: getattr(self, name) for name in type(self).model_fields} | changes)

    def deciding(self) -> dict[str, object]:
        """Return the fields that affect results, at any depth, as JSON."""
        plain = self.model_dump(mode="json")
        return {name: _deciding(getattr(self, name), plain[name]) for name in self._deciding_names()}

    def _deciding_names(self) -> Iterator[str]:
        for name, field in type(self).model_fields.items():
            marks = {type(mark) for mark in field.metadata}
            if _HowToRun not in marks and not (_AddedLater in marks and getattr(self, name) == field.default):
                yield name

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_wrong_bools(cls, value: object, info: ValidationInfo) -> object:
        """Refuse a boolean where a number is expected, and the reverse; Python and pydantic would convert them."""
        kinds = _leaf_types(cls.model_fields[str(info.field_name)].annotation)
        if Any in kinds:
            return value
        if bool in kinds:
            if not isinstance(value, bool) and not (value is None and type(None) in kinds):
                raise ValueError("Give true or false")
        elif not any(isinstance(kind, type) and issubclass(kind, Settings) for kind in kinds) and _holds_bool(value):
            raise ValueError("Give a value of another type; this key is not a true/false switch")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _refuse_beyond_fp32(cls, value: object) -> object:
        """Refuse a float that fp32 cannot hold."""
        if any(number and not SMALLEST <= abs(number) < LARGEST for number in _floats(value)):
            raise ValueError("Give 0, or a number between 1.2e-38 and 3.4e38 in size")
        return value


def _floats(value: object) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _floats(each)


def _deciding(value: object, plain: Any) -> object:
    """Return the part of one value that affects results. plain: the value as JSON."""
    if isinstance(value, Settings):
        return value.deciding()
    if isinstance(value, tuple):
        return [_deciding(*pair) for pair in zip(value, plain, strict=True)]
    return plain


def _leaf_types(annotation: object) -> set[object]:
    """Return the types inside an annotation, without unions, containers and metadata."""
    if get_origin(annotation) is Literal:
        return {type(each) for each in get_args(annotation)}
    parts = get_args(annotation)
    return {leaf for part in parts for leaf in _leaf_types(part)} if parts else {annotation}


def _holds_bool(value: object) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_bool, value.values()))
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_holds_bool, value)))


def explain(error: ValidationError, nearest: Callable[[Sequence[int | str]], str]) -> str:
    """Return the first problem and the number of further problems. nearest: the place of an unknown key -> a hint."""
    problems = error.errors(include_url=False)
    first = min(problems, key=lambda each: each["type"] != "extra_forbidden")  # an unknown key often causes the others
    more = len(problems) - 1
    return _told(first, nearest) + (f" ({numbers.counted(more, 'more error')}.)" if more else "")


def _told(problem: ErrorDetails, nearest: Callable[[Sequence[int | str]], str]) -> str:
    kind, value = problem["type"], problem["input"]
    where = ".".join(part for part in map(str, problem["loc"]) if not part.startswith("("))  # tags of unions
    if kind == "extra_forbidden":
        return f"{where} is not a known key.{nearest(problem['loc'])}"
    if kind == "missing":
        return f"{where} is missing."
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input ").rstrip(".")
    message = f"give {EXPECTED[kind]}" if kind in EXPECTED else message
    if not where or isinstance(value, dict | Settings):
        return f"{where}: {message}.".removeprefix(": ")
    known = re.findall("'(.*?)'", problem["ctx"]["expected"]) if kind == "literal_error" else ()
    return f"{where} is {shown(value)}: {message[0].lower()}{message[1:]}.{did_you_mean(str(value), known)}"
