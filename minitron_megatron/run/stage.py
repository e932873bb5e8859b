"""Definition of a stage of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import TypedDict

from ..recipe import Recipe
from ..run_folder import RunFolder
from .context import Context, Result

__all__ = ["Model", "Record", "Result", "Stage", "Trained"]


class Record(TypedDict):
    """Record of a finished stage."""

    fingerprint: str
    result: Result
    seconds: float
    peak_bytes: int


class Model(TypedDict):
    """Result of a stage that writes a model."""

    hash: str
    files: str
    """Checksum of the list of the model files' checksums."""


class Trained(Model):
    """Result of a stage that trains a model."""

    tokens: int


@dataclass(frozen=True)
class Stage:
    """One step of a run."""

    name: str
    does: Callable[[Context], Result]
    """Function that runs the stage."""
    makes: Callable[[RunFolder], Path]
    """Path that exists if the stage's output does."""
    result: type
    """Type of the result. A record is validated against it when it is read."""
    reads: tuple[str, ...]
    """Top-level recipe keys that the stage reads. It runs again when one changes."""
    after: tuple[str, ...] = ()
    """Earlier stages whose results the stage uses; `align` stands for all rounds. It runs again when one changes."""
    makes_too: Callable[[RunFolder], Sequence[Path]] = lambda run: ()
    """Further outputs, each of which exists only for some recipes."""
    wanted: Callable[[Recipe], bool] = lambda recipe: True
    """Whether a recipe has this stage."""
    extra_inputs: Callable[[Recipe], object] = lambda recipe: None
    """Further inputs, as JSON: single keys of other blocks, checksums of files. They enter the fingerprint."""
    decides: Callable[[Recipe, Result], Recipe] | None = None
    """(recipe, result) -> recipe for the later stages. They see the stage's result only through it."""
    keeps: Callable[[RunFolder, str], Path] | None = None
    """(run folder, fingerprint) -> folder of partial results that an interrupted stage resumes from."""

    def is_called(self, name: str) -> bool:
        """Return whether `name` means this stage: its own name, or `align` for each round of alignment."""
        return name in (self.name, _kind(self.name))

    def uses(self, stage: str) -> bool:
        """Return whether this stage uses the result of another one."""
        return stage in self.after or _kind(stage) in self.after


def _kind(stage: str) -> str:
    """Return `align` for a round of alignment, `align-1`, `align-2` and so on; other names as they are."""
    kind, _, number = stage.partition("-")
    return kind if kind == "align" and number.isdecimal() else stage
