"""Paths that match a glob, none of them by mistake left out or met twice."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from fnmatch import filter as matching
from glob import has_magic
from pathlib import Path

from ..files import files_below

__all__ = ["glob_paths"]

ANY_DEPTH = "**"


def glob_paths(pattern: str) -> list[Path]:
    """Return the paths that match a glob, sorted. Hidden ones match where the pattern has the dot.

    Python's `glob` skips folders that it cannot read, and follows links that lead back up some forty times. Here the
    first is an OSError or FileError, and `**` enters no folder twice.
    """
    path = Path(pattern)
    parts = path.parts[1:] if path.anchor else path.parts
    return sorted(set(_matches(Path(path.anchor), parts)))


def _matches(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    if not parts:
        yield folder
        return
    part, *rest = parts
    if part == ANY_DEPTH:
        found = [folder, *_folders_below(folder)] if rest else [folder]
    elif has_magic(part):
        found = [folder / name for name in matching(os.listdir(folder), part) if part[0] == "." or name[0] != "."]
    else:
        found = [folder / part]
    for each in found:
        if each.is_dir() if rest else os.path.lexists(each):
            yield from _matches(each, rest)


def _folders_below(folder: Path) -> set[Path]:
    """Return the folders at any depth that hold files, without hidden ones."""
    parents = {parent for file in files_below(folder) for parent in file.parents if folder in parent.parents}
    return {parent for parent in parents if not any(part[0] == "." for part in parent.relative_to(folder).parts)}
