"""The types of recipe keys: what YAML may say, and how a wrong value is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

__all__ = [
    "Count",
    "DType",
    "FilePath",
    "HeldOut",
    "HowToRun",
    "Keys",
    "Layers",
    "NotNegative",
    "Positive",
    "Seed",
    "Steps",
    "Text",
    "Written",
]

DType = Literal["float32", "bfloat16"]

MOST = 2**63 - 1
"""The largest count: what an int64 index holds."""
LONGEST_NAME, LONGEST_PATH = 255, 4096
"""Linux's limits on a file name and a path, in bytes."""


def _whole(value: Any) -> Any:
    """YAML reads `94e9` as text and `94.0e9` as a float: both are whole numbers here."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _layers(value: Any) -> Any:
    """A number of layers, or a list of them; said once, where pydantic would tell of each alternative."""
    listed = value if isinstance(value, list | tuple) else [value]
    whole = all(isinstance(layer, int) and 0 <= layer <= MOST for layer in listed)
    if not whole or not listed or (isinstance(value, int) and value < 1):
        raise ValueError("Give how many layers to keep, or a list of those that stay")
    return value


def _path(value: Any) -> Any:
    """Refuse what no file system takes; an empty path would be the current folder."""
    if not isinstance(value, str | Path):
        raise ValueError("Give a path")
    try:
        text = str(value).encode()
    except UnicodeEncodeError as error:
        raise ValueError("Give a path whose name is UTF-8") from error
    if not text.strip() or b"\0" in text:
        raise ValueError("Give a path; it is empty or holds a NUL character")
    if len(text) > LONGEST_PATH or any(len(name) > LONGEST_NAME for name in text.split(b"/")):
        raise ValueError(f"Give a path of at most {LONGEST_PATH} bytes, with names of at most {LONGEST_NAME}")
    return value


def _held_out(value: Any) -> Any:
    """Files, or a share of the documents; said once, where pydantic would tell of both."""
    try:
        share = float(value)
    except (TypeError, ValueError):
        return _path(value)
    if not 0 < share < 1:
        raise ValueError("Give held-out files, or the share of documents to hold out, between 0 and 1")
    return share


Text = Annotated[str, Field(min_length=1)]
Written = Annotated[str, BeforeValidator(str)]
FilePath = Annotated[Path, BeforeValidator(_path)]
HeldOut = Annotated[Path | float, BeforeValidator(_held_out)]
Count = Annotated[int, BeforeValidator(_whole), Field(gt=0, le=MOST)]
Steps = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=MOST)]
Seed = Annotated[int, BeforeValidator(_whole), Field(ge=0, lt=2**32)]
"""The range that numpy's and torch's generators share."""
Layers = Annotated[int | tuple[int, ...], BeforeValidator(_layers)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


T = TypeVar("T")


class _HowToRun:
    """The mark of a key that no result depends on."""


HowToRun = Annotated[T, _HowToRun()]
"""A key that only says how to run. Every key without this mark decides results, and is in the fingerprints of the
stages that read it."""


class Keys(BaseModel):
    """A block of keys. No number in it is infinite or NaN, and true is not 1."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=False
    )

    @classmethod
    def says_how_to_run(cls, name: str) -> bool:
        """Whether no result depends on a key of this block."""
        return any(isinstance(mark, _HowToRun) for mark in cls.model_fields[name].metadata)

    def deciding(self) -> dict[str, Any]:
        """The keys that results depend on, at any depth, as JSON."""
        plain, names = self.model_dump(mode="json"), type(self).model_fields
        return {name: _deciding(getattr(self, name), plain[name]) for name in names if not self.says_how_to_run(name)}

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Python takes true for 1 and pydantic takes 1 for true: neither is what a recipe means."""
        kinds = _leaf_types(cls.model_fields[str(info.field_name)].annotation)
        if bool in kinds:
            if not isinstance(value, bool) and not (value is None and type(None) in kinds):
                raise ValueError("Give true or false")
        elif not any(isinstance(kind, type) and issubclass(kind, Keys) for kind in kinds) and _holds_bool(value):
            raise ValueError("Give a value; true and false are for switches")
        return value


def _deciding(value: Any, plain: Any) -> Any:
    """plain: the value as JSON."""
    if isinstance(value, Keys):
        return value.deciding()
    if isinstance(value, tuple):
        return [_deciding(*pair) for pair in zip(value, plain, strict=True)]
    return plain


def _leaf_types(annotation: Any) -> set[Any]:
    """The types that an annotation is made of, without unions, containers and metadata."""
    if get_origin(annotation) is Literal:
        return {type(each) for each in get_args(annotation)}
    parts = get_args(annotation)
    return {leaf for part in parts for leaf in _leaf_types(part)} if parts else {annotation}


def _holds_bool(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_bool, value.values()))
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_holds_bool, value)))
