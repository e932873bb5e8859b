"""The shape of a model out of a file."""

from __future__ import annotations

from typing import Any

from ..errors import FileError
from ..files import check_as
from ..layout import Shape

__all__ = ["read_shape"]

MOST_LAYERS, MOST = 10**5, 2**31
"""Larger numbers are no model's, and lists as long would fill the memory."""


def read_shape(value: Any, where: str) -> Shape:
    """Return a JSON value as a Shape that a model can have. Raises FileError, which says `where`."""
    shape = check_as(value, Shape, where)
    if shape.layers > MOST_LAYERS or max(vars(shape).values()) > MOST:
        raise FileError(f"{where} holds the shape of no model: a size is out of reach.")
    return shape
