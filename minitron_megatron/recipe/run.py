"""The stages in order: done ones are skipped, edited ones run again, a killed one resumes."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import yaml

from ..errors import CheckpointError, FileError, RecipeError
from ..events import Listener, silent
from ..files import check_as, locked, read_as, read_text, whole_file, write_json
from ..parallel import Topology, barrier, broadcast_object, fail_together, gather_objects, launched, peak_bytes
from .check import check, check_corpus, planned
from .context import Context, Folders
from .estimate import count
from .fingerprint import fingerprint
from .leaving import Leaving, leaving
from .phases import prefixes
from .results import RESULTS, Record
from .schema import Recipe
from .searching import search_share
from .stage import Stage
from .stages import STAGES
from .versions import versions
from .yaml_tree import read_yaml

__all__ = ["Results", "Step", "dry_run", "results", "run", "search_task", "wanted"]

Results = dict[str, dict[str, Any]]

LOCK = ".lock"


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
        return _run(recipe, topology, only, held.enter_context(leaving(listener)), before)


def _run(recipe: Recipe, topology: Topology, only: str | None, listener: Leaving, before: int) -> Results:
    _predict(recipe, topology)
    done: Results = {}
    for stage in wanted(recipe):
        mark = fingerprint(stage, recipe, done)
        record = broadcast_object(recorded(recipe, stage, mark))
        if record is None:
            if only not in (None, stage.name):
                raise RecipeError(
                    f"{only} needs the stage {stage.name}, which is not done. Run `minitron {stage.name}` first."
                )
            listener.begins(stage.name, keeps=bool(stage.keeps))
            marks = partial(fingerprint, stage, done=dict(done))
            record = _run_stage(stage, mark, Context(recipe, topology, listener, done, marks), before)
        done[stage.name] = record["result"] | {"seconds": record["seconds"]}
        if stage.decides:
            recipe = stage.decides(recipe, done[stage.name])
            _predict(recipe, topology)
        if stage.name == only:
            break
        if stage.name == "prepare":
            check_corpus(recipe, done["prepare"]["sources"])
    return done


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
            leave = held.enter_context(leaving(listener))
            leave.begins("search", keeps=True)
            context = Context(recipe, topology, leave, results(recipe, "score"), lambda other: "")
            if topology.rank == 0:
                mine = recipe.out / f".task-{task}-of-{tasks}.lock"
                for path, shared in ((recipe.out / LOCK, True), (mine, False)):
                    if not held.enter_context(locked(path, shared=shared)):
                        raise RecipeError(f"another run, or this task, is at work in {recipe.out}. Wait for it.")
        return search_share(context, task, tasks)


def _predict(recipe: Recipe, topology: Topology) -> None:
    """Writes what the run should take, on the first rank; before a search has ended, with the largest candidate."""
    if topology.rank == 0:
        expected = count(recipe, gpus=topology.world)
        write_json(recipe.out / "predicted.json", {"model": str(recipe.model), **expected.predictions()})
        for sentence in expected.warnings:
            warnings.warn(sentence, stacklevel=4)
    barrier()


def dry_run(recipe: Recipe) -> list[Step]:
    """What a run would do, stage by stage, from the records alone. Raises what `run` would raise before work begins."""
    check(recipe, planned(recipe, launched("WORLD_SIZE", 0)))
    steps: list[Step] = []
    done: Results = {}
    stale: set[str] = set()
    undecided: set[str] = set()
    for stage in wanted(recipe):
        before = [name for name in (*stage.after, *undecided) if name in stale]
        mark = fingerprint(stage, recipe, done) if not before else ""
        record = recorded(recipe, stage, mark) if mark else None
        if record is not None:
            done[stage.name] = record["result"]
            if stage.name == "prepare":
                check_corpus(recipe, record["result"]["sources"])
            steps.append(Step(stage.name, "done", ""))
            recipe = stage.decides(recipe, record["result"]) if stage.decides else recipe
            continue
        stale.add(stage.name)
        if stage.decides:
            undecided.add(stage.name)
        if before:
            steps.append(Step(stage.name, "run", f"after {', '.join(before)}"))
        elif stage.keeps and (recipe.out / stage.keeps.format(mark=mark[:16])).is_dir():
            steps.append(Step(stage.name, "resume", "with what is measured already"))
        elif (Folders(recipe.out).checkpoints / mark[:16]).is_dir():
            steps.append(Step(stage.name, "resume", "from a checkpoint"))
        else:
            known = Folders(recipe.out).record(stage.name).is_file()
            steps.append(Step(stage.name, "run", "its inputs changed" if known else "not done yet"))
    return steps


def wanted(recipe: Recipe) -> list[Stage]:
    """The stages of this recipe, in order."""
    return [stage for stage in STAGES.values() if stage.wanted(recipe)]


def recorded(recipe: Recipe, stage: Stage, mark: str) -> dict[str, Any] | None:
    """What a stage left, if it is done by this fingerprint and its output is still there."""
    path = Folders(recipe.out).record(stage.name)
    if not path.is_file() or not (recipe.out / stage.makes).exists():
        return None
    try:
        record: dict[str, Any] = dict(read_as(path, Record))
        if record["fingerprint"] != mark:
            return None
        check_as(record["result"], RESULTS[stage.name], f"{path}: result")
    except FileError as error:
        raise CheckpointError(f"{error} Remove it to run the stage {stage.name} again.") from error
    return record


def results(recipe: Recipe, until: str) -> Results:
    """What the stages up to and with `until` left. Raises RecipeError where one is not done."""
    done: Results = {}
    for stage in wanted(recipe):
        record = recorded(recipe, stage, fingerprint(stage, recipe, done))
        if record is None:
            raise RecipeError(f"the stage {stage.name} of {recipe.out} is not done. Run `minitron {stage.name}` first.")
        done[stage.name] = record["result"] | {"seconds": record["seconds"]}
        recipe = stage.decides(recipe, record["result"]) if stage.decides else recipe
        if stage.name == until:
            break
    return done


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
    """Makes the run folder this recipe's, and keeps others out meanwhile. Raises RecipeError where it is another's, or
    where another run is at work in it."""
    out, mine = recipe.out, recipe.model_dump(mode="json")
    saved = out / "recipe.yaml"
    if saved.is_file():
        try:
            theirs = read_yaml(read_text(saved))
        except RecipeError as error:
            raise RecipeError(f"{saved}: {error} Give another folder with --out.") from error
        other = theirs.get("model") if isinstance(theirs, dict) else None
        if other != mine["model"]:
            raise RecipeError(f"{out} belongs to a recipe for the model {other}. Give another folder with --out.")
    elif out.is_dir() and any(path.name != LOCK for path in out.iterdir()):
        raise RecipeError(f"{out} is not empty and was not made by a run. Give another folder with --out.")
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / LOCK) as alone:
        if not alone:
            raise RecipeError(f"another run is at work in {out}. Wait for it, or give another folder with --out.")
        with whole_file(saved) as partial:
            partial.write_text(yaml.safe_dump(mine, sort_keys=False), encoding="utf-8")
        write_json(out / "versions.json", versions() | {"processes": topology.world})
        yield
