"""The shape of a model out of a file."""

from __future__ import annotations

from typing import Any

from ..errors import FileError
from ..files import check_as
from ..layout import Shape

__all__ = ["read_shape"]

POSITIVE = ("layers", "hidden", "heads", "kv_groups", "head_dim", "vocab")


def read_shape(value: Any, where: str) -> Shape:
    """Return a JSON value as a Shape that a model can have. Raises FileError, which says `where`."""
    shape = check_as(value, Shape, where)
    wrong = [name for name in POSITIVE if getattr(shape, name) < 1]
    wrong += [name for name, size in vars(shape).items() if not isinstance(size, bool) and not 0 <= size < 2**31]
    if wrong or shape.heads % shape.kv_groups:
        raise FileError(f"{where} holds no shape of a model: see {wrong[0] if wrong else 'heads and kv_groups'}.")
    return shape
