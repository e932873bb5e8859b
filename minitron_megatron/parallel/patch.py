"""Process-wide replacement of attributes of torch and mcore; what is replaced stands in `torch_patches.py` and
`mcore_patches.py`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["patch", "patched", "unpatched"]

_originals: dict[tuple[object, str], object] = {}
_ABSENT = object()


def patch(owner: object, name: str, replacement: object) -> None:
    """Replace an attribute of a module or class for the whole process; a second call changes nothing."""
    if (owner, name) not in _originals:
        _originals[owner, name] = vars(owner).get(name, _ABSENT)
        setattr(owner, name, replacement)


@contextmanager
def patched(owner: object, name: str, replacement: object) -> Iterator[None]:
    """Replace an attribute inside the block only."""
    before = getattr(owner, name)
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def unpatched(owner: object, name: str) -> Iterator[None]:
    """Undo a `patch` inside the block: tests show by it that the patch is still needed."""
    replacement, original = vars(owner)[name], _originals[owner, name]
    delattr(owner, name) if original is _ABSENT else setattr(owner, name, original)
    try:
        yield
    finally:
        setattr(owner, name, replacement)
