"""What a stage of a run is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..recipe import Recipe
from ..run_folder import RunFolder
from .context import Context

__all__ = ["Result", "Stage"]

Result = dict[str, Any]
"""What a stage leaves for those after it, as JSON. Those that read it run again when it changes."""


@dataclass(frozen=True)
class Stage:
    """One step of a run."""

    name: str
    does: Callable[[Context], Result]
    makes: Callable[[RunFolder], Path]
    """Path whose existence shows that the stage's output is there."""
    reads: tuple[str, ...]
    """Keys of the recipe whose change makes it run again."""
    after: tuple[str, ...] = ()
    """Stages whose results it uses, and whose change makes it run again."""
    wanted: Callable[[Recipe], bool] = lambda recipe: True
    asks: Callable[[Recipe], Any] = lambda recipe: None
    """Whatever else of the recipe makes it run again when it changes, as JSON."""
    decides: Callable[[Recipe, Result], Recipe] | None = None
    """What a recipe becomes by its result: the stages after it read that, and its result by no other way."""
    keeps: Callable[[RunFolder, str], Path] | None = None
    """(run folder, fingerprint) -> folder of measurements that a stopped stage continues from."""
