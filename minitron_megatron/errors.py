"""Exception types. Each message says what is wrong, where, and what to do, in at most three sentences.

A `MinitronError` is one that the user can fix: the command line prints its message and exits with code 2.
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
    "first_line",
]


class MinitronError(Exception):
    """Error that the user can fix."""


class RecipeError(MinitronError, ValueError):
    """The recipe, or a combination of its keys, cannot be run."""


class LayoutError(MinitronError, KeyError):
    """A parameter or an axis has no row in the layout table."""

    __str__ = Exception.__str__  # KeyError would print the message's repr


class ModelError(MinitronError, ValueError):
    """The sizes or constants do not describe a valid model."""


class PlanError(MinitronError, ValueError):
    """A plan does not fit the model or the parallel layout."""


class TopologyError(MinitronError, ValueError):
    """The parallel layout does not fit the processes or the model."""


class CheckpointError(MinitronError):
    """A checkpoint is missing, damaged, from another run, or does not fit the model."""


class TrainingError(MinitronError):
    """Training cannot continue."""


class FileError(MinitronError, ValueError):
    """A file or folder cannot be read or written, or its content is damaged."""


class Preempted(Exception):
    """The scheduler's signal ended the run after its state was saved: exit code 75; the same command resumes it."""


class DataError(MinitronError):
    """A corpus, tokenizer or calibration set is missing, damaged or does not fit the model."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the closest known word, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without a full stop; an error without a message gives its type."""
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__


def expect_number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    whole: bool = False,
) -> None:
    """Raise RecipeError unless `value` is a finite number in the given range. Booleans are rejected."""
    fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if fits:
        assert isinstance(value, int | float)
        fits = (above is None or value > above) and (at_least is None or value >= at_least)
        fits = fits and (at_most is None or value <= at_most)
    if not fits:
        ends = {"above": above, "of at least": at_least, "of at most": at_most}
        bounds = " and ".join(f"{word} {end:g}" for word, end in ends.items() if end is not None)
        kind = "whole number" if whole else "finite number"
        raise RecipeError(f"{name} is {value!r}. It must be a {kind} {bounds}".rstrip() + ".")
