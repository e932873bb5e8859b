"""Keys of a family: several students in one recipe, each with a run of its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..errors import did_you_mean
from ..settings import Field, Settings, Text, model_validator

__all__ = ["TEACHER", "FamilyStudent", "check_family_keys"]

TEACHER = "model"
"""Name of the recipe's own model in `pruned_from` and `teacher`."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
FIXED = ("family", "model", "out", "plugins", "student", "tokenizer")
"""Keys that the family itself sets, or that are one for all of it."""


class FamilyStudent(Settings):
    """A student of a family: the recipe's keys apply to it, with the changes of `set`."""

    name: Text
    """Its name, and its run folder in `out`."""
    pruned_from: Text = TEACHER
    """The model that it is pruned from: `model`, or the name of a student before it, as that was distilled."""
    teacher: Text | None = None
    """The model that it is distilled from: `model`, or the name of a student before it. Default: what it is pruned
    from. The recipe's `correct` corrects `model` alone: the students are trained on this text already."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Recipe key, with dots, -> value, as with `--set`."""

    @model_validator(mode="after")
    def _is_usable(self) -> FamilyStudent:
        if not NAME.fullmatch(self.name) or self.name in (TEACHER, "shared"):
            raise ValueError(f"{self.name!r} cannot be a student's name: use letters, digits, dots, - and _")
        for key in self.set:
            if key.partition(".")[0] in FIXED:
                raise ValueError(f"A student of a family cannot set {key}: remove it")
        return self


def check_family_keys(family: Sequence[FamilyStudent]) -> None:
    """Raise ValueError where two students have one name, or one names a model that is not there before it."""
    known = [TEACHER]
    for student in family:
        if student.name in (*known, *(f"{name}-cut" for name in known)):
            raise ValueError(f"Two runs of the family would be called {student.name}: rename one of the students")
        for key, name in (("pruned_from", student.pruned_from), ("teacher", student.teacher)):
            if name is not None and name not in known:
                raise ValueError(
                    f"{key} of {student.name} is {name!r}, which is no student before it.{did_you_mean(name, known)} "
                    f"Give {' or '.join(known)}"
                )
        known.append(student.name)
