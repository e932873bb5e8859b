"""Types of recipe keys: the YAML values they accept, and the errors for the others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, field_validator

from ..data import HUB

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
    "Sources",
    "Steps",
    "Text",
    "Written",
]

DType = Literal["float32", "bfloat16"]

MOST = 2**63 - 1
"""The largest count: the maximum of an int64 index."""
LONGEST_NAME, LONGEST_PATH = 255, 4096
"""Linux's limits on a file name and a path, in bytes."""


def _whole(value: Any) -> Any:
    """Turn `94e9` (text in YAML) and `94.0e9` (a float) into the whole numbers they mean."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _layers(value: Any) -> Any:
    """Check a number of layers or a list of layer indices, with one message (pydantic gives one per alternative)."""
    listed = value if isinstance(value, list | tuple) else [value]
    whole = all(isinstance(layer, int) and 0 <= layer <= MOST for layer in listed)
    if not whole or not listed or (isinstance(value, int) and value < 1):
        raise ValueError("Give the number of layers to keep, or a list of the layers to keep")
    return value


def _path(value: Any) -> Any:
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


def _sources(value: Any) -> Any:
    """Check a place of text or a list of places, with one message (pydantic gives one per alternative)."""
    if isinstance(value, list | tuple) and value:
        return tuple(map(_source, value))
    return _source(value)


def _source(value: Any) -> str:
    return str(value) if str(_path(value)).startswith(HUB) else str(Path(value))


def _held_out(value: Any) -> Any:
    """Check held-out files or a share of the documents, with one message (pydantic gives one per alternative)."""
    try:
        share = float(value)
    except (TypeError, ValueError):
        return _source(value)
    if not 0 < share < 1:
        raise ValueError("Give a path of held-out files, or the share of documents to hold out, between 0 and 1")
    return share


Text = Annotated[str, Field(min_length=1)]
Written = Annotated[str, BeforeValidator(str)]
FilePath = Annotated[Path, BeforeValidator(_path)]
Sources = Annotated[str | tuple[str, ...], BeforeValidator(_sources)]
HeldOut = Annotated[str | float, BeforeValidator(_held_out)]
Count = Annotated[int, BeforeValidator(_whole), Field(gt=0, le=MOST)]
Steps = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=MOST)]
Seed = Annotated[int, BeforeValidator(_whole), Field(ge=0, lt=2**32)]
"""Seed in the range that both numpy's and torch's generators accept."""
Layers = Annotated[int | tuple[int, ...], BeforeValidator(_layers)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


T = TypeVar("T")


class _HowToRun:
    """Mark of a key that does not affect results."""


HowToRun = Annotated[T, _HowToRun()]
"""A key that does not affect results, such as the layout. Every key without this mark does, and is part of the
fingerprint of the stages that read it."""


class Keys(BaseModel):
    """A block of recipe keys. Numbers are finite, and booleans are not accepted as numbers."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=False
    )

    @classmethod
    def is_how_to_run(cls, name: str) -> bool:
        """Whether a key of this block has no effect on results."""
        return any(isinstance(mark, _HowToRun) for mark in cls.model_fields[name].metadata)

    def deciding(self) -> dict[str, Any]:
        """Return the keys that affect results, at any depth, as JSON."""
        plain, names = self.model_dump(mode="json"), type(self).model_fields
        return {name: _deciding(getattr(self, name), plain[name]) for name in names if not self.is_how_to_run(name)}

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_wrong_bools(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse a boolean where a number is expected, and the reverse; Python and pydantic would convert them."""
        kinds = _leaf_types(cls.model_fields[str(info.field_name)].annotation)
        if bool in kinds:
            if not isinstance(value, bool) and not (value is None and type(None) in kinds):
                raise ValueError("Give true or false")
        elif not any(isinstance(kind, type) and issubclass(kind, Keys) for kind in kinds) and _holds_bool(value):
            raise ValueError("Give a value of another type; this key is not a true/false switch")
        return value


def _deciding(value: Any, plain: Any) -> Any:
    """Return the part of one value that affects results. plain: the value as JSON."""
    if isinstance(value, Keys):
        return value.deciding()
    if isinstance(value, tuple):
        return [_deciding(*pair) for pair in zip(value, plain, strict=True)]
    return plain


def _leaf_types(annotation: Any) -> set[Any]:
    """Return the types inside an annotation, without unions, containers and metadata."""
    if get_origin(annotation) is Literal:
        return {type(each) for each in get_args(annotation)}
    parts = get_args(annotation)
    return {leaf for part in parts for leaf in _leaf_types(part)} if parts else {annotation}


def _holds_bool(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_bool, value.values()))
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(map(_holds_bool, value)))
