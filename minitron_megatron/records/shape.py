"""Reading the shape of a model from a file."""

from __future__ import annotations

from ..errors import FileError
from ..files import check_as
from ..layout import Shape

__all__ = ["read_shape"]

MOST_LAYERS, MOST = 10**5, 2**31
"""Upper bounds of a shape's sizes: no model has larger ones, and lists of such a length would fill the memory."""


def read_shape(value: object, where: str) -> Shape:
    """Return a JSON value as a Shape of plausible size. Raises FileError, which names `where`."""
    shape = check_as(value, Shape, where)
    if shape.layers > MOST_LAYERS or max(vars(shape).values()) > MOST:
        raise FileError(f"{where} does not hold a model's shape: a size exceeds {MOST:,} or {MOST_LAYERS:,} layers.")
    return shape
