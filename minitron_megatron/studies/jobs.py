"""The runs of a study: one per arm and seed, each a recipe with a run folder of its own, or a family of them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..convert import read_config
from ..errors import MinitronError, RecipeError
from ..forecast import FamilyRun, check, check_family, runs_of, student_shape, with_model_folders
from ..layout import parameters
from ..model import is_megatron_checkpoint
from ..parallel import Topology
from ..recipe import Recipe, load_recipe
from ..run import SharedStages, planned_marks
from .quantities import filled, parameters_of, quantities
from .study import Arm, Study, slug

__all__ = ["LAST", "Job", "Plan", "check_job", "plan_study", "share_of"]

LAST = "evaluate"
"""Last stage of an arm: a study exports nothing."""
NEAR = 0.05
"""Relative difference in parameters up to which two students count as of one size."""
STEPS = 64
"""Widths are matched in steps of a sixty-fourth of the teacher's."""


@dataclass(frozen=True)
class Job:
    """An arm with one seed: one run, or the runs of a family, of which the last one's student is measured."""

    arm: str
    seed: int
    recipe: Recipe

    @cached_property
    def runs(self) -> tuple[FamilyRun, ...]:
        return runs_of(self.recipe)

    @property
    def measured(self) -> Recipe:
        """Recipe of the run whose summary the study reads."""
        return self.runs[-1].recipe

    def executions(self, seen: set[str]) -> list[tuple[FamilyRun, list[str]]]:
        """Return the stages of each run whose marks are not in `seen`, and add them there."""
        found = []
        for run in self.runs:
            marks = planned_marks(run.planned, run.until or LAST)
            found.append((run, [stage for stage, mark in marks.items() if mark not in seen]))
            seen |= set(marks.values())
        return found


@dataclass(frozen=True)
class Plan:
    """All runs of a study, arm by arm, in a folder that several studies may share."""

    name: str
    study: Study
    folder: Path
    """The study's own folder: its runs, table and plot."""
    jobs: tuple[Job, ...]

    @property
    def shared(self) -> SharedStages:
        """Stages that all studies of the folder share."""
        return SharedStages(self.folder.parent / "shared")

    @property
    def seeds(self) -> list[int]:
        return list(dict.fromkeys(job.seed for job in self.jobs))

    def executions(self) -> list[tuple[Job, list[tuple[FamilyRun, list[str]]]]]:
        """Return the stages that no earlier run of the plan makes, job by job, counted from an empty folder."""
        seen: set[str] = set()
        return [(job, job.executions(seen)) for job in self.jobs]


def plan_study(
    name: str, study: Study, path: Path, overrides: Sequence[str] = (), out: Path | None = None, seeds: int = 3
) -> Plan:
    """Return the runs of a study of a recipe. Raises RecipeError if the recipe, or an arm of it, cannot be used.

    overrides: of the recipe, before the study's own. out: folder of all studies, by default `<out of the
    recipe>-studies`. seeds: how many, from the recipe's on.
    """
    recipe = load_recipe(path, overrides)
    if is_megatron_checkpoint(recipe.model):
        raise RecipeError(
            f"{recipe.model} is a Megatron checkpoint, which each run would import anew. Run `minitron prepare`, then "
            f"use `--set model={recipe.out / 'imported-model'}`."
        )
    for key in study.needs:
        if _value(recipe, key) is None:
            raise RecipeError(f"the study {name} needs {key} in the recipe. Set it, for example with --set.")
    folder = (out or recipe.out.with_name(f"{recipe.out.name}-studies")) / slug(Path(name).stem)
    base = with_model_folders(recipe)
    names = quantities(base)
    jobs = []
    for arm_name, arm in study.arms.items():
        try:
            sets = [f"{key}={json.dumps(value)}" for key, value in filled(_merged(study, arm), names).items()]
            for seed in range(recipe.seed, recipe.seed + seeds):
                place = folder / slug(arm_name) / f"seed-{seed}"
                found = load_recipe(path, [*overrides, *sets, f"seed={seed}"], place)
                jobs.append(Job(arm_name, seed, _matched(found, base, arm, arm_name)))
        except MinitronError as error:
            raise type(error)(f"arm {arm_name!r} of the study {name}: {error}") from error
    return Plan(name, study, folder, tuple(jobs))


def check_job(job: Job, topology: Topology) -> None:
    """Raise a MinitronError for the first problem that a run of a job would meet. Not collective."""
    if job.recipe.family:
        check_family(job.runs, topology)
    else:
        check(job.recipe, topology)


def _value(recipe: Recipe, key: str) -> object:
    """Return the value at a key with dots; None where a block above it, or the entry of a list, is missing."""
    value: object = recipe
    for part in key.split("."):
        if isinstance(value, tuple):
            value = value[int(part)] if part.isdigit() and int(part) < len(value) else None
        else:
            value = getattr(value, part, None)
    return value


def _merged(study: Study, arm: Arm) -> Mapping[str, Any]:
    """Return the overrides of an arm: the study's, then its own."""
    return study.set | arm.set


def _matched(recipe: Recipe, base: Recipe, arm: Arm, name: str) -> Recipe:
    """Return the recipe with the size of one axis at which its student is nearest to the base recipe's."""
    if arm.match is None:
        return recipe
    if base.search or base.student or recipe.family:
        raise RecipeError("students of equal size need a recipe that gives the sizes. Give them in `prune`.")
    teacher, wanted = read_config(base.model).shape, parameters_of(base)
    whole = teacher.axis_size(arm.match)
    step = max(1, whole // STEPS) if arm.match != "layers" else 1
    sized = [recipe.replaced(prune=recipe.prune.replaced(**{arm.match: n})) for n in range(step, whole + 1, step)]
    counts = [parameters(student_shape(each, teacher)) for each in sized]
    nearest = min(range(len(sized)), key=lambda n: abs(counts[n] - wanted))
    if abs(counts[nearest] / wanted - 1) > NEAR:
        warnings.warn(
            f"the students of {name!r} have {counts[nearest]:,} parameters: {arm.match} alone cannot bring them nearer "
            f"to the recipe's {wanted:,}.",
            stacklevel=3,
        )
    return sized[nearest]


def share_of(jobs: Sequence[Job], task: int, tasks: int) -> list[Job]:
    """Return the runs of one task of an array. With as many tasks as seeds, or a multiple, each task has one seed.

    Raises RecipeError if there is no such task.
    """
    if not 0 <= task < tasks:
        raise RecipeError(f"--array {task}/{tasks} is out of range: use 0/{tasks} to {tasks - 1}/{tasks}.")
    return list(jobs[task::tasks])
