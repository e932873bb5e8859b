"""A family: the runs of its students, in order, and what they cost together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import numbers
from ..convert import read_config, temporary_outline
from ..errors import MinitronError, RecipeError
from ..gpus import MFU
from ..layout import Shape, parameters
from ..model import is_megatron_checkpoint
from ..parallel import Topology
from ..recipe import TEACHER, FamilyStudent, Recipe, recipe_with
from ..run_folder import RunFolder
from .check import check
from .estimate import Estimate, estimate
from .model_folders import with_model_folders
from .sizes import student_shape

__all__ = ["FamilyEstimate", "FamilyRun", "check_family", "estimate_family", "family_runs", "runs_of", "saving"]

CUT = "prune"
"""Last stage of a run that only prunes."""
PRUNES = ("prune", "search")
"""Keys of pruning, which a run that only distils does not have."""
PRETRAINING = 40
"""Tokens of a pretraining for each token of distillation: [A] 4.4, 3.8 trillion over 94 billion."""


@dataclass(frozen=True)
class FamilyRun:
    """One run of a family: of a student, or only of its pruning where another model distils it."""

    name: str
    """Its folder in the family's."""
    recipe: Recipe
    planned: Recipe
    """The recipe with the config and tokenizer alone in place of each model of the family, which may not be made."""
    until: str | None
    """Last stage; None: all."""


def family_runs(recipe: Recipe) -> tuple[FamilyRun, ...]:
    """Return the runs of a recipe's family, in order. Raises MinitronErrors that name the student."""
    if is_megatron_checkpoint(recipe.model):
        raise RecipeError(
            f"{recipe.model} is a Megatron checkpoint, which each run of the family would import anew. Import it with "
            "a run of its own, and name that run's imported-model as `model`."
        )
    places, outlines, runs = {TEACHER: recipe.model}, dict[Path, Path](), list[FamilyRun]()
    for student in recipe.family:
        try:
            for name, own, until in _recipes(recipe, student, places):
                run = FamilyRun(name, own, _planned(own, outlines), until)
                made = RunFolder(own.out).model("pruned" if until else "distilled")
                outlines[made] = _outline(run.planned)
                runs.append(run)
            places[student.name] = made
        except MinitronError as error:
            raise type(error)(f"student {student.name} of the family: {error}") from error
    return tuple(runs)


def runs_of(recipe: Recipe) -> tuple[FamilyRun, ...]:
    """Return the runs of a recipe: those of its family, or without one its own."""
    return family_runs(recipe) if recipe.family else (FamilyRun(recipe.out.name, recipe, recipe, None),)


def _recipes(
    recipe: Recipe, student: FamilyStudent, places: Mapping[str, Path]
) -> Iterator[tuple[str, Recipe, str | None]]:
    """Yield name, recipe and last stage of the runs of a student. places: the models that are there before it."""
    source, teacher = places[student.pruned_from], places[student.teacher or student.pruned_from]
    corrects = any(key.split(".")[0] == "correct" for key in student.set)

    def run_of(name: str, model: Path, changes: Mapping[str, Any], *without: str) -> Recipe:
        own = {**changes, "model": str(model), "out": str(recipe.out / name)}
        uncorrected = () if model == recipe.model or corrects else ("correct",)
        return recipe_with(recipe, own, without=("family", *without, *uncorrected))

    if source == teacher:
        yield student.name, run_of(student.name, source, student.set), None
        return
    cut = f"{student.name}-cut"
    yield cut, run_of(cut, source, student.set), CUT
    distilled = {key: value for key, value in student.set.items() if key.split(".")[0] not in PRUNES}
    distilled |= {"student": str(RunFolder(recipe.out / cut).model("pruned")), "score.depth": None}
    yield student.name, run_of(student.name, teacher, distilled, *PRUNES), None


def _planned(recipe: Recipe, outlines: Mapping[Path, Path]) -> Recipe:
    folders = {key: outlines.get(place, place) for key, place in recipe.models.items()}
    return recipe.replaced(**folders)


def _outline(planned: Recipe) -> Path:
    """Return a folder with the config and tokenizer of the student of a run."""
    found = with_model_folders(planned)
    config = read_config(found.student or found.model)
    shape = student_shape(found, read_config(found.model).shape)
    return temporary_outline(replace(config, shape=shape), torch.float32, found.student or found.model)


def check_family(runs: Sequence[FamilyRun], topology: Topology) -> None:
    """Raise the error of the first run that could not be carried out, before any is. Not collective."""
    for run in runs:
        with _named(run.name):
            check(run.planned, topology, counts_only=True)


@contextmanager
def _named(run: str) -> Iterator[None]:
    try:
        yield
    except MinitronError as error:
        raise type(error)(f"run {run} of the family: {error}") from error


@dataclass(frozen=True)
class FamilyEstimate:
    """Costs of a family."""

    runs: Mapping[str, Estimate]
    """Name of a run -> its cost; of one that only prunes, without what comes after."""
    saving: tuple[float, float]
    """As `saving` returns it."""

    def whole(self) -> Estimate:
        """Return the costs of all runs, one after another, as those of the largest one."""
        largest = max(self.runs.values(), key=lambda each: each.rank_bytes)
        hours, flops = (sum(getattr(each, key) for each in self.runs.values()) for key in ("hours", "flops"))
        return replace(largest, hours=hours, flops=flops)

    def rows(self) -> list[list[str]]:
        """Return run, the student's parameters, tokens, FLOPs and time of each run."""
        return [
            [
                name,
                f"{each.student_parameters:,}",
                f"{each.distill_tokens:,}",
                numbers.flops(each.flops),
                numbers.duration(3600 * each.hours),
            ]
            for name, each in self.runs.items()
        ]

    def summary(self) -> str:
        """Return the costs of all, and what they save, in sentences."""
        whole, (alone, honest) = self.whole(), self.saving
        return (
            f"All runs: {numbers.flops(whole.flops)}, {whole.rows()['time']}. To pretrain the teacher "
            f"and every student costs {alone:.2f} times what it costs to pretrain the teacher and to distil the "
            f"students on 1/{PRETRAINING} of the tokens, as the first paper counts, and {honest:.2f} times with the "
            "teachers' forward passes."
        )


def estimate_family(recipe: Recipe, *, gpus: int | None = None, mfu: float = MFU) -> FamilyEstimate:
    """Estimate a recipe's family, as `estimate` does each run. Raises MinitronErrors that name the run."""
    found, students = dict[str, Estimate](), list[tuple[Shape, Shape]]()
    for run in family_runs(recipe):
        with _named(run.name):
            cost = estimate(run.planned, gpus=gpus, mfu=mfu)
        found[run.name] = cost if run.until is None else cost.only(run.until)
        if run.until is None:
            students.append((cost.student, cost.teacher))
    teacher = read_config(with_model_folders(recipe).model).shape
    return FamilyEstimate(found, saving(teacher, students))


def saving(teacher: Shape, students: Sequence[tuple[Shape, Shape]]) -> tuple[float, float]:
    """Return what a family saves: FLOPs of pretraining all of its models, over those of pretraining the teacher and
    distilling the students on a fortieth of the tokens; and the same with the teachers' forward passes.

    students: shape of each, and of the model that it is distilled from. FLOPs are 6 a parameter and token, 2 of a
    forward pass ([A] 4.4, which counts no teacher in distillation).
    """
    own = parameters(teacher)
    scratch = own + sum(parameters(student) for student, _ in students)
    distilled = sum(parameters(student) for student, _ in students)
    forward = sum(parameters(its) for _, its in students) / 3
    return scratch / (own + distilled / PRETRAINING), scratch / (own + (distilled + forward) / PRETRAINING)
