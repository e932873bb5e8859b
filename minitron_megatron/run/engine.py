"""The stages in order: done ones are skipped, edited ones run again, a killed one resumes."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import yaml

from ..errors import CheckpointError, FileError, RecipeError
from ..events import Listener, silent
from ..files import check_as, locked, read_as, read_text, whole_file, write_json
from ..forecast import check, check_corpus, count, planned
from ..parallel import Topology, barrier, broadcast_object, fail_together, gather_objects, launched, peak_bytes
from ..recipe import Recipe, prefixes, read_yaml
from ..run_folder import RunFolder
from .context import Context
from .fingerprint import fingerprint
from .preemption import PreemptionListener, raise_when_preempted
from .results import RESULTS, Record
from .stage import Stage
from .stages import STAGES
from .stages.search import search_share
from .versions import versions

__all__ = ["Results", "Step", "dry_run", "results", "run", "search_task", "wanted"]

Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Step:
    """A stage as a run would find it."""

    stage: str
    state: str
    """`done`, `run` or `resume`."""
    why: str


def run(recipe: Recipe, topology: Topology, *, only: str | None = None, listener: Listener = silent) -> Results:
    """Runs every stage that is not done, or `only` one, and returns the results by stage. Collective over the world.

    Raises MinitronErrors on every rank alike, before anything is written where the recipe can tell, and Preempted after
    SIGTERM or SIGUSR1.
    """
    before = peak_bytes()
    with ExitStack() as held:
        with fail_together():
            _check_wanted(recipe, only)
            check(recipe, topology)
            if topology.rank == 0:
                held.enter_context(_claimed(recipe, topology))
        return _run(recipe, topology, only, held.enter_context(raise_when_preempted(listener)), before)


def _run(recipe: Recipe, topology: Topology, only: str | None, listener: PreemptionListener, before: int) -> Results:
    _predict(recipe, topology)
    walk = _Walk(recipe)
    for stage in walk.stages:
        record = broadcast_object(walk.recorded(stage))
        if record is None:
            if only not in (None, stage.name):
                raise RecipeError(
                    f"{only} needs the stage {stage.name}, which is not done. Run `minitron {stage.name}` first."
                )
            listener.begins(stage.name, keeps=stage.keeps is not None)
            marks = partial(fingerprint, stage, done=dict(walk.done))
            context = Context(walk.recipe, topology, listener, dict(walk.done), marks)
            record = _run_stage(stage, walk.mark(stage), context, before)
        walk.finish(stage, record)
        if stage.decides:
            _predict(walk.recipe, topology)
        if stage.name == only:
            break
        if stage.name == "prepare":
            check_corpus(walk.recipe, walk.done["prepare"]["sources"])
    return walk.done


def search_task(recipe: Recipe, topology: Topology, task: int, tasks: int, *, listener: Listener = silent) -> str:
    """One task's share of a search, beside other tasks at work in the same run folder; a sentence on what is left.

    Collective over the world. Raises RecipeError where the stages before it are not done, and where this task, or
    another run, is at work already.
    """
    with ExitStack() as held:
        with fail_together():
            if not 0 <= task < tasks:
                raise RecipeError(f"task {task} of {tasks} is none. Tasks count from 0.")
            _check_wanted(recipe, "search")
            check(recipe, topology)
            leave = held.enter_context(raise_when_preempted(listener))
            leave.begins("search", keeps=True)
            context = Context(recipe, topology, leave, results(recipe, "score"), lambda other: "")
            if topology.rank == 0:
                folder = RunFolder(recipe.out)
                for path, shared in ((folder.lock, True), (folder.task_lock(task, tasks), False)):
                    if not held.enter_context(locked(path, shared=shared)):
                        raise RecipeError(f"another run, or this task, is at work in {recipe.out}. Wait for it.")
        return search_share(context, task, tasks)


def _predict(recipe: Recipe, topology: Topology) -> None:
    """Writes what the run should take, on the first rank; before a search has ended, with the largest candidate."""
    if topology.rank == 0:
        expected = count(recipe, gpus=topology.world)
        write_json(RunFolder(recipe.out).predicted, {"model": str(recipe.model), **expected.predictions()})
        for sentence in expected.warnings:
            warnings.warn(sentence, stacklevel=4)
    barrier()


def dry_run(recipe: Recipe) -> list[Step]:
    """Return what a run would do, stage by stage, from the records alone. Raises what `run` raises before it begins."""
    check(recipe, planned(recipe, launched("WORLD_SIZE", 0)))
    walk, steps = _Walk(recipe), list[Step]()
    stale: set[str] = set()
    undecided: set[str] = set()
    for stage in walk.stages:
        before = [name for name in (*stage.after, *undecided) if name in stale]
        record = None if before else walk.recorded(stage)
        if record is not None:
            if stage.name == "prepare":
                check_corpus(walk.recipe, record["result"]["sources"])
            walk.finish(stage, record)
            steps.append(Step(stage.name, "done", ""))
            continue
        stale.add(stage.name)
        if stage.decides:
            undecided.add(stage.name)
        state, why = ("run", f"after {', '.join(before)}") if before else walk.resumes(stage)
        steps.append(Step(stage.name, state, why))
    return steps


def results(recipe: Recipe, until: str) -> Results:
    """Return what the stages up to and with `until` left. Raises RecipeError where one is not done."""
    walk = _Walk(recipe)
    for stage in walk.stages:
        record = walk.recorded(stage)
        if record is None:
            raise RecipeError(f"the stage {stage.name} of {recipe.out} is not done. Run `minitron {stage.name}` first.")
        walk.finish(stage, record)
        if stage.name == until:
            break
    return walk.done


def wanted(recipe: Recipe) -> list[Stage]:
    """Return the stages of this recipe, in order."""
    return [stage for stage in STAGES.values() if stage.wanted(recipe)]


class _Walk:
    """A recipe's stages in order, beside the records of those that are done.

    A stage may decide keys of the recipe for those after it: `recipe` is the one for the stage that comes next.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.stages, self._folder = recipe, wanted(recipe), RunFolder(recipe.out)
        self.done: Results = {}

    def mark(self, stage: Stage) -> str:
        """Return the stage's fingerprint. The stages before it must be done."""
        return fingerprint(stage, self.recipe, self.done)

    def recorded(self, stage: Stage) -> dict[str, Any] | None:
        """Return what a stage left, if it is done by its fingerprint and its output is still there."""
        path = self._folder.record(stage.name)
        if not path.is_file() or not stage.makes(self._folder).exists():
            return None
        try:
            record: dict[str, Any] = dict(read_as(path, Record))
            if record["fingerprint"] != self.mark(stage):
                return None
            check_as(record["result"], RESULTS[stage.name], f"{path}: result")
        except FileError as error:
            raise CheckpointError(f"{error} Remove it to run the stage {stage.name} again.") from error
        return record

    def finish(self, stage: Stage, record: Mapping[str, Any]) -> None:
        """Take up a finished stage's results."""
        self.done[stage.name] = record["result"] | {"seconds": record["seconds"]}
        if stage.decides:
            self.recipe = stage.decides(self.recipe, record["result"])

    def resumes(self, stage: Stage) -> tuple[str, str]:
        """Return (`run` or `resume`, why) of a stage that is not done."""
        mark = self.mark(stage)
        if stage.keeps is not None and stage.keeps(self._folder, mark).is_dir():
            return "resume", "with what is measured already"
        if (self._folder.checkpoints / mark[:16]).is_dir():
            return "resume", "from a checkpoint"
        return "run", "its inputs changed" if self._folder.record(stage.name).is_file() else "not done yet"


def _run_stage(stage: Stage, mark: str, context: Context, before: int) -> dict[str, Any]:
    """What the stage leaves. `peak_bytes`: by how much the fullest rank's peak lies above `before`, the run's start."""
    began = time.perf_counter()
    result = stage.does(context)
    barrier()
    seconds = round(time.perf_counter() - began, 3)
    peak = max(gather_objects(peak_bytes() - before))
    record = {"fingerprint": mark, "result": result, "seconds": seconds, "peak_bytes": peak}
    if context.topology.rank == 0:
        write_json(context.folders.record(stage.name), record)
        if not (stage.name == "distill" and context.recipe.distill.retain):
            for each in prefixes(context.recipe):
                shutil.rmtree(context.checkpoints(each), ignore_errors=True)
    barrier()
    return record


def _check_wanted(recipe: Recipe, only: str | None) -> None:
    names = [stage.name for stage in wanted(recipe)]
    if only is not None and only not in names:
        raise RecipeError(f"this recipe has no stage {only}. Its stages are {', '.join(names)}.")


@contextmanager
def _claimed(recipe: Recipe, topology: Topology) -> Iterator[None]:
    """Make the run folder this recipe's, and keep others out meanwhile.

    Raises RecipeError where it belongs to another model's recipe or to nobody known, or where another run is at work.
    """
    folder, told = RunFolder(recipe.out), recipe.model_dump(mode="json")
    if folder.recipe.is_file():
        try:
            saved = read_yaml(read_text(folder.recipe))
        except RecipeError as error:
            raise RecipeError(f"{folder.recipe}: {error} Give another folder with --out.") from error
        other = saved.get("model") if isinstance(saved, dict) else None
        if other != told["model"]:
            raise RecipeError(
                f"{recipe.out} belongs to a recipe for the model {other}. Give another folder with --out."
            )
    elif any(folder.files()):
        raise RecipeError(f"{recipe.out} is not empty and was not made by a run. Give another folder with --out.")
    recipe.out.mkdir(parents=True, exist_ok=True)
    with locked(folder.lock) as acquired:
        if not acquired:
            raise RecipeError(
                f"another run is at work in {recipe.out}. Wait for it, or give another folder with --out."
            )
        with whole_file(folder.recipe) as partial:
            partial.write_text(yaml.safe_dump(told, sort_keys=False), encoding="utf-8")
        write_json(folder.versions, versions() | {"processes": topology.world})
        yield
