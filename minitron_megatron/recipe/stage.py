"""What a stage of a run is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .context import Context
from .schema import Recipe

__all__ = ["Result", "Stage"]

Result = dict[str, Any]
"""What a stage leaves for those after it, as JSON. Those that read it run again when it changes."""


@dataclass(frozen=True)
class Stage:
    """One step of a run."""

    name: str
    does: Callable[[Context], Result]
    makes: str
    """What it leaves in the run folder."""
    reads: tuple[str, ...]
    """Keys of the recipe whose change makes it run again."""
    after: tuple[str, ...] = ()
    """Stages whose results it uses, and whose change makes it run again."""
    wanted: Callable[[Recipe], bool] = lambda recipe: True
    asks: Callable[[Recipe], Any] = lambda recipe: None
    """Whatever else of the recipe makes it run again when it changes, as JSON."""
    decides: Callable[[Recipe, Result], Recipe] | None = None
    """What a recipe becomes by its result: the stages after it read that, and its result by no other way."""
    keeps: str = ""
    """Where in the run folder what it has measured waits for the rest: it goes on from there when it was stopped.
    `{mark}` stands for the beginning of its fingerprint."""
