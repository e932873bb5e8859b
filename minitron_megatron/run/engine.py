"""Run the stages in order: finished ones are skipped, changed ones run again, an interrupted one resumes."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import yaml

from ..errors import CheckpointError, FileError, RecipeError
from ..events import Listener, silent
from ..files import check_as, locked, read_as, read_text, whole_file, write_json
from ..forecast import check, check_calibration, check_corpus, count, planned, with_model_folders
from ..parallel import Topology, barrier, broadcast_object, fail_together, gather_objects, launched, peak_bytes
from ..recipe import Recipe, read_yaml, with_keys_in_errors
from ..run_folder import RunFolder
from .bring_in import bring_in
from .context import Context
from .fingerprint import fingerprint
from .preemption import PreemptionListener, raise_when_preempted
from .shared import SharedStages
from .stage import Record, Result, Stage
from .stages import STAGES, round_stage
from .stages.search import search_share
from .status import StatusFile
from .versions import versions

__all__ = ["Results", "Step", "dry_run", "planned_marks", "results", "run", "search_task", "wanted"]

Results = dict[str, Result]
"""Stage -> its result, and its duration as `seconds`."""

CORPUS_CHECKS = {"prepare": check_corpus, "calibrate": check_calibration}
"""Stage that tokenizes -> check that its sources have enough tokens."""


@dataclass(frozen=True)
class Step:
    """State of a stage before a run."""

    stage: str
    state: str
    """`done`, `run` or `resume`."""
    why: str


@with_keys_in_errors()
def run(
    recipe: Recipe,
    topology: Topology,
    *,
    only: str | None = None,
    until: str | None = None,
    shared: SharedStages | None = None,
    listener: Listener = silent,
) -> Results:
    """Run every stage that is not done, or `only` one, and return the results by stage. Collective over the world.

    until: the last stage to run. shared: stages that other runs have finished are taken from there, and this run's are
    added. Raises MinitronErrors alike on every rank, and before anything is written if the recipe itself is wrong.
    Raises Preempted after SIGTERM or SIGUSR1.
    """
    before = peak_bytes()
    with ExitStack() as held:
        with fail_together():
            _check_wanted(recipe, only, until)
            check(recipe, topology)
            if topology.rank == 0:
                held.enter_context(_claimed(recipe, topology))
        recipe = bring_in(recipe, topology, listener)
        preemption = held.enter_context(raise_when_preempted(listener))
        return _run_stages(recipe, topology, only, until, shared, preemption, before)


def _run_stages(
    recipe: Recipe,
    topology: Topology,
    only: str | None,
    until: str | None,
    shared: SharedStages | None,
    listener: PreemptionListener,
    before: int,
) -> Results:
    """before: peak memory at the start of the run, in bytes."""
    _predict(recipe, topology)
    walk = _Walk(recipe)
    names = [stage.name for stage in walk.stages]
    asked = only or until
    last = [stage.name for stage in walk.stages if asked is None or stage.is_called(asked)][-1]
    names = names[: names.index(last) + 1]
    with StatusFile(RunFolder(recipe.out), names, writes=topology.rank == 0) as status:
        for stage in walk.stages[: len(names)]:
            record: Record | None = broadcast_object(walk.recorded(stage))
            if record is None and only is not None and not stage.is_called(only):
                raise RecipeError(
                    f"{only} needs the stage {stage.name}, which is not done. Run `minitron {stage.name}` first."
                )
            status.set(stage.name, "running" if record is None else "done")
            if record is None:
                listener.begins(stage.name, keeps=stage.keeps is not None)
                marks = partial(fingerprint, stage, done=dict(walk.done))
                context = Context(walk.recipe, topology, listener, dict(walk.done), marks)
                record = _obtain(stage, walk.mark(stage), context, before, shared)
                status.set(stage.name, "ran")
            walk.finish(stage, record)
            if stage.decides:
                _predict(walk.recipe, topology)
            if stage.name != last and stage.name in CORPUS_CHECKS:
                CORPUS_CHECKS[stage.name](walk.recipe, walk.done[stage.name]["sources"])
    return walk.done


@with_keys_in_errors()
def search_task(recipe: Recipe, topology: Topology, task: int, tasks: int, *, listener: Listener = silent) -> str:
    """Run one task's share of a search, in parallel to other tasks in the same run folder; return its status as text.

    Collective over the world. Raises RecipeError if an earlier stage is not done, or if this task or another run is
    already running.
    """
    with ExitStack() as held:
        with fail_together():
            if not 0 <= task < tasks:
                raise RecipeError(f"--task {task}/{tasks} is out of range: use 0/{tasks} to {tasks - 1}/{tasks}.")
            _check_wanted(recipe, "search")
            recipe = check(recipe, topology)
            preemption = held.enter_context(raise_when_preempted(listener))
            preemption.begins("search", keeps=True)
            context = Context(recipe, topology, preemption, results(recipe, "score"))
            if topology.rank == 0:
                folder = RunFolder(recipe.out)
                for path, shared in ((folder.lock, True), (folder.task_lock(task, tasks), False)):
                    if not held.enter_context(locked(path, shared=shared)):
                        raise RecipeError(
                            f"another run, or the same task, is running in {recipe.out}. Wait until it ends."
                        )
        return search_share(context, task, tasks)


def _predict(recipe: Recipe, topology: Topology) -> None:
    """Write the predicted cost of the run, on rank 0; before a search has ended, with its largest candidate."""
    if topology.rank == 0:
        expected = count(recipe, gpus=topology.world)
        write_json(RunFolder(recipe.out).predicted, {"model": str(recipe.model), **expected.predictions()})
        for sentence in expected.warnings:
            warnings.warn(sentence, stacklevel=4)
    barrier()


def dry_run(recipe: Recipe) -> list[Step]:
    """Return what a run would do, stage by stage, from the records alone. Raises the errors of `run`'s checks."""
    recipe = check(recipe, planned(recipe, launched("WORLD_SIZE", 0)))
    walk, steps = _Walk(recipe), list[Step]()
    stale: list[str] = []
    undecided: set[str] = set()
    for stage in walk.stages:
        before = [name for name in stale if stage.uses(name) or name in undecided]
        record = None if before else walk.recorded(stage)
        if record is not None:
            if stage.name in CORPUS_CHECKS:
                CORPUS_CHECKS[stage.name](walk.recipe, record["result"]["sources"])
            walk.finish(stage, record)
            steps.append(Step(stage.name, "done", ""))
            continue
        stale.append(stage.name)
        if stage.decides:
            undecided.add(stage.name)
        state, why = ("run", f"after {', '.join(before)}") if before else walk.resumes(stage)
        steps.append(Step(stage.name, state, why))
    return steps


def results(recipe: Recipe, until: str) -> Results:
    """Return the results of the stages up to and including `until`. Raises RecipeError if one is not done."""
    walk = _Walk(recipe)
    for stage in walk.stages:
        record = walk.recorded(stage)
        if record is None:
            raise RecipeError(f"the stage {stage.name} of {recipe.out} is not done. Run `minitron {stage.name}` first.")
        walk.finish(stage, record)
        if stage.name == until:
            break
    return walk.done


def planned_marks(recipe: Recipe, until: str) -> dict[str, str]:
    """Return a mark of each stage up to and including `until`: two recipes have the same one if they will share the
    stage. Nothing has to be done yet; the marks are not fingerprints, which hold the results of earlier stages."""
    marks: dict[str, str] = {}
    recipe = with_model_folders(recipe)
    for stage in wanted(recipe):
        marks[stage.name] = fingerprint(stage, recipe, {name: {"mark": mark} for name, mark in marks.items()})
        if stage.name == until:
            break
    return marks


def wanted(recipe: Recipe) -> list[Stage]:
    """Return the stages of this recipe, in order."""
    rounds = [round_stage(number) for number in range(1, len(recipe.align) + 1)]
    stages = [stage for stage in STAGES.values() if stage.wanted(recipe)]
    end = [stage.name for stage in stages].index("evaluate")
    return [*stages[:end], *rounds, *stages[end:]]


class _Walk:
    """A recipe's stages in order, with the results of those that are done.

    A stage may change the recipe for the stages after it: `recipe` is the one for the next stage.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.stages, self._folder = recipe, wanted(recipe), RunFolder(recipe.out)
        self.done: Results = {}

    def mark(self, stage: Stage) -> str:
        """Return the stage's fingerprint. The stages before it must be done."""
        return fingerprint(stage, self.recipe, self.done)

    def recorded(self, stage: Stage) -> Record | None:
        """Return a stage's record if its fingerprint matches and its output exists; otherwise None."""
        path = self._folder.record(stage.name)
        if not path.is_file() or not stage.makes(self._folder).exists():
            return None
        try:
            record = read_as(path, Record)
            if record["fingerprint"] != self.mark(stage):
                return None
            check_as(record["result"], stage.result, f"{path}: result")
        except FileError as error:
            raise CheckpointError(f"{error} Remove it to run the stage {stage.name} again.") from error
        return record

    def finish(self, stage: Stage, record: Record) -> None:
        """Add a finished stage's result."""
        self.done[stage.name] = record["result"] | {"seconds": record["seconds"]}
        if stage.decides:
            self.recipe = stage.decides(self.recipe, record["result"])

    def resumes(self, stage: Stage) -> tuple[str, str]:
        """Return (`run` or `resume`, reason) of a stage that is not done."""
        mark = self.mark(stage)
        if stage.keeps is not None and stage.keeps(self._folder, mark).is_dir():
            return "resume", "from what it saved"
        if (self._folder.checkpoints / mark[:16]).is_dir():
            return "resume", "from a checkpoint"
        return "run", "its inputs changed" if self._folder.record(stage.name).is_file() else "not done yet"


def _obtain(stage: Stage, mark: str, context: Context, before: int, shared: SharedStages | None) -> Record:
    """Take a stage's outputs from the shared ones if they are there, or run it; return its record."""
    if shared is None:
        return _run_stage(stage, mark, context, before)
    with ExitStack() as held:
        taken = None
        with fail_together():
            if context.topology.rank == 0:
                held.enter_context(shared.claimed(stage, mark, context.listener))
                taken = shared.take(stage, mark, context.folders)
        found: Record | None = broadcast_object(taken)
        return found or _run_stage(stage, mark, context, before, shared)


def _run_stage(stage: Stage, mark: str, context: Context, before: int, shared: SharedStages | None = None) -> Record:
    """Run a stage, write its record and return it. `peak_bytes`: peak memory of the fullest rank, minus `before`."""
    began = time.perf_counter()
    result = stage.does(context)
    barrier()
    seconds = round(time.perf_counter() - began, 3)
    peak = max(gather_objects(peak_bytes() - before))
    record: Record = {"fingerprint": mark, "result": result, "seconds": seconds, "peak_bytes": peak}
    with fail_together():
        if (
            shared is not None and context.topology.rank == 0
        ):  # before the record, so that a kill leaves no stage unshared
            shared.give(stage, record, context.folders)
    if context.topology.rank == 0:
        write_json(context.folders.record(stage.name), record)
        if not (stage.name == "distill" and context.recipe.distill.retain):
            for folder, _ in context.phase_checkpoints:
                shutil.rmtree(folder, ignore_errors=True)
    barrier()
    return record


def _check_wanted(recipe: Recipe, *asked: str | None) -> None:
    stages = wanted(recipe)
    names = [stage.name for stage in stages]
    for name in asked:
        if name is not None and not any(stage.is_called(name) for stage in stages):
            raise RecipeError(f"this recipe does not use the stage {name}. Its stages are {', '.join(names)}.")


@contextmanager
def _claimed(recipe: Recipe, topology: Topology) -> Iterator[None]:
    """Lock the run folder, and write the recipe and the versions into it.

    Raises RecipeError if the folder belongs to a recipe for another model, is not a run folder, or is locked by
    another run.
    """
    folder, keys = RunFolder(recipe.out), recipe.model_dump(mode="json")
    if folder.recipe.is_file():
        try:
            saved = read_yaml(read_text(folder.recipe))
        except RecipeError as error:
            raise RecipeError(f"{folder.recipe}: {error} Give another folder with --out.") from error
        other = saved.get("model") if isinstance(saved, dict) else None
        if other != keys["model"]:
            raise RecipeError(
                f"{recipe.out} belongs to a recipe for the model {other}. Give another folder with --out."
            )
    elif any(folder.files()):
        raise RecipeError(f"{recipe.out} is not empty and was not made by a run. Give another folder with --out.")
    recipe.out.mkdir(parents=True, exist_ok=True)
    with locked(folder.lock) as acquired:
        if not acquired:
            raise RecipeError(
                f"another run is running in {recipe.out}. Wait until it ends, or give another folder with --out."
            )
        with whole_file(folder.recipe) as partial:
            partial.write_text(yaml.safe_dump(keys, sort_keys=False), encoding="utf-8")
        write_json(folder.versions, versions() | {"processes": topology.world})
        yield
