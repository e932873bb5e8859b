"""The error kinds. Each message says what was asked, what is there and what to do, in at most three sentences.

A `MinitronError` is the user's to mend: the command line prints its message and exits with 2.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "DataError",
    "FileError",
    "LayoutError",
    "MinitronError",
    "ModelError",
    "PlanError",
    "Preempted",
    "RecipeError",
    "TopologyError",
    "TrainingError",
    "did_you_mean",
    "expect_number",
]


class MinitronError(Exception):
    """Something the user can mend."""


class RecipeError(MinitronError, ValueError):
    """The recipe, or a combination of its keys, cannot be run."""


class LayoutError(MinitronError, KeyError):
    """A parameter or an axis has no row in the layout table."""

    __str__ = Exception.__str__  # KeyError would print the message's repr


class ModelError(MinitronError, ValueError):
    """Sizes or constants that make no model."""


class PlanError(MinitronError, ValueError):
    """A plan does not fit the model or the parallel layout."""


class TopologyError(MinitronError, ValueError):
    """The parallel layout does not fit the processes or the model."""


class CheckpointError(MinitronError):
    """A checkpoint is missing, torn, foreign or does not fit."""


class TrainingError(MinitronError):
    """Training cannot go on."""


class FileError(MinitronError, ValueError):
    """A file or folder cannot be read or written, or its content is torn."""


class Preempted(Exception):
    """A scheduler's signal ended the run after its state was saved: exit code 75, run the same command again."""


class DataError(MinitronError):
    """A corpus, a tokenizer or a calibration set does not fit."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the nearest known word, or the empty string."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def expect_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    whole: bool = False,
) -> None:
    """Raise RecipeError where `value` is no finite number in its range. True and false are no numbers."""
    fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if fits:
        assert isinstance(value, int | float)
        fits = (above is None or value > above) and (at_least is None or value >= at_least)
        fits = fits and (at_most is None or value <= at_most)
    if not fits:
        ends = {"above": above, "at least": at_least, "at most": at_most}
        bounds = " and ".join(f"{word} {end:g}" for word, end in ends.items() if end is not None)
        kind = "whole number" if whole else "finite number"
        raise RecipeError(f"{name} is {value!r}. It must be a {kind} {bounds}".rstrip() + ".")
