"""Types of keys that only recipes have: YAML values that may be written in two ways."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from ..data import check_source
from ..settings import MOST

__all__ = ["DType", "HeldOut", "Layers"]

DType = Literal["float32", "bfloat16"]


def _layers(value: object) -> object:
    """Check a number of layers or a list of layer indices, with one message (pydantic gives one per alternative)."""
    listed = value if isinstance(value, list | tuple) else [value]
    whole = all(isinstance(layer, int) and 0 <= layer <= MOST for layer in listed)
    if not whole or not listed or (isinstance(value, int) and value < 1):
        raise ValueError("Give the number of layers to keep, or a list of the layers to keep")
    return value


def _held_out(value: object) -> object:
    """Check held-out files or a share of the documents, with one message (pydantic gives one per alternative)."""
    try:
        share = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return check_source(value)
    if not 0 < share < 1:
        raise ValueError("Give a path of held-out files, or the share of documents to hold out, between 0 and 1")
    return share


HeldOut = Annotated[str | float, BeforeValidator(_held_out)]
Layers = Annotated[int | tuple[int, ...], BeforeValidator(_layers)]
