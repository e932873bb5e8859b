"""Stage `search`: measure candidates right after pruning, distil the best ones briefly, choose one.

Each candidate's measurements are in a file of its own, so that nothing is measured twice by an interrupted search, an
edited grid, or the tasks of a job array that share one run folder.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

from typing_extensions import TypedDict

from ...convert import read_config
from ...data import calibration_batches
from ...errors import RecipeError, TrainingError, did_you_mean
from ...events import Event
from ...files import checksum, write_json
from ...forecast import candidates_of
from ...parallel import broadcast_object, fail_together, gather_objects, independent_replicas, place_in_world
from ...prune import choose, choose_layers
from ...recipe import CHOOSE_BY, Recipe, Search, light_recipe
from ...records import DepthScores, Plan, Scores
from ...search import MORE_IS_BETTER, Candidate, Curve, front, halving, knee, rungs, settled, zero_shot
from ..candidate_files import AfterCut, Distilled, Part, curve_of, finite, number, read_part
from ..context import DTYPES, Context
from ..fingerprint import digest, task_marks, untimed
from ..measure_tasks import score_of
from ..refitting import refit_candidate, repair_of
from ..stage import Result, Stage
from ..training import distil, distillation_inputs
from .prune import cut
from .score import load_depth, load_scores

__all__ = ["SEARCH", "search_share"]


class Searched(TypedDict):
    winner: str
    by: str
    loss: float | None
    sizes: dict[str, int]
    layers: list[int] | None
    candidates: int
    distilled: int


def search_shapes(context: Context) -> Result:
    """Measure every candidate, choose one, write the table and return the stage's result. Collective over the world."""
    work = _CandidateSearch(context)
    losses = work.after_cut()
    curves = work.distilled(work.best(losses))
    result = work.conclude(losses, curves)
    if context.topology.rank == 0:
        for folder, _ in work.training.phase_checkpoints:
            shutil.rmtree(folder, ignore_errors=True)
    return result


def search_share(context: Context, task: int, tasks: int) -> str:
    """Measure one of `tasks` shares, as far as possible now; return the status as text. Collective over the world.

    Candidates are distributed round-robin. If the next step needs measurements of other tasks that are missing, the
    function returns early: start the tasks again later, or run the whole stage, which does the rest.
    """
    work = _CandidateSearch(context, task, tasks)
    try:
        work.distilled(work.best(work.after_cut()))
    except _WaitError as status:
        return str(status)
    return "Every candidate is measured. Run `minitron search` to choose one."


def search_inputs(recipe: Recipe) -> list[object] | None:
    """Return the search's inputs other than its own keys: how candidates are pruned, chosen and trained."""
    if recipe.search is None:
        return None
    table = recipe.search.serving.table
    inputs: list[object] = [_pruning_keys(recipe), checksum(table) if table else None, _task_inputs(recipe)]
    return inputs if recipe.search.light is None else [*inputs, _light_inputs(recipe)]


def _light_inputs(recipe: Recipe) -> list[object]:
    """Return the inputs of a candidate's light distillation, including the held-out text of its curve."""
    light = light_recipe(recipe)
    return [light.distill.deciding(), light.dtype, distillation_inputs(light), recipe.evaluate.samples]


def _task_inputs(recipe: Recipe) -> list[object] | None:
    """Return the inputs of a candidate's task score; None if no task chooses."""
    assert recipe.search is not None
    keys = recipe.search
    return None if keys.choose in CHOOSE_BY else [keys.choose, recipe.evaluate.deciding(), task_marks(recipe)]


def _pruning_keys(recipe: Recipe) -> dict[str, object]:
    refit = set() if recipe.prune.refit == "none" else {"refit", "refit_samples", "refit_ridge"}
    return recipe.prune.model_dump(include={"scope", "contiguous", "teacher", *refit})


def decided(recipe: Recipe, result: Result) -> Recipe:
    """Return the recipe with the winner's sizes in `prune` and without the search."""
    layers = None if result["layers"] is None else tuple(result["layers"])
    prune = recipe.prune.replaced(**result["sizes"], layers=layers)
    return recipe.replaced(prune=prune, search=None)


class _WaitError(Exception):
    """The next step needs measurements of other tasks that are still missing."""


@dataclass(frozen=True)
class _CandidateSearch:
    """A running search: all of it, or one task's share."""

    context: Context
    task: int = 0
    tasks: int = 1

    @property
    def recipe(self) -> Recipe:
        return self.context.recipe

    @property
    def keys(self) -> Search:
        assert self.recipe.search is not None
        return self.recipe.search

    @cached_property
    def candidates(self) -> dict[str, Candidate]:
        teacher = read_config(self.context.prune_source).shape
        return {each.name: each for each in candidates_of(self.recipe, teacher)}

    @cached_property
    def scores(self) -> Scores:
        return load_scores(self.context)

    @cached_property
    def depth(self) -> DepthScores:
        return load_depth(self.context)

    def plan(self, name: str) -> Plan:
        """Return the plan that prunes a candidate. All candidates use the same scores."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about ties are repeated when the winner is pruned
            widths, scope = self._widths(self.candidates[name]), self.recipe.prune.scope
            return choose(self.scores, layers=self.layers(name), scope=scope, **widths)

    def layers(self, name: str) -> tuple[int, ...] | None:
        """Return the layers that a candidate keeps; None: all."""
        keep = self.candidates[name].shape.layers
        if keep == self.scores.shape.layers:
            return None
        return choose_layers(self.depth, keep=keep, contiguous=self.recipe.prune.contiguous)

    def _widths(self, candidate: Candidate) -> dict[str, int]:
        return {axis: size for axis, size in candidate.sizes.items() if axis != "layers"}

    @cached_property
    def _pruning_mark(self) -> str:
        """Hash of the inputs of a candidate's loss right after pruning, other than the candidate itself."""
        return digest([untimed(self.context.done), _pruning_keys(self.recipe), _task_inputs(self.recipe)])

    @cached_property
    def _training_mark(self) -> str:
        """Hash of the inputs of a candidate's curve, other than the candidate itself."""
        return digest([self._pruning_mark, _light_inputs(self.recipe)])

    def _parts(self, mark: str) -> Path:
        return self.context.folders.search_parts / mark[:16]

    def _known(self, mark: str, names: Sequence[str], kind: type) -> dict[str, Part]:
        """Read the candidates' existing measurements on rank 0 and return them on every rank.

        Collective over the world. Raises FileError for an invalid file.
        """
        paths = {name: self._parts(mark) / f"{name}.json" for name in names}
        read: dict[str, Part] = {}
        with fail_together():
            if place_in_world()[0] == 0:
                read = {name: read_part(path, kind) for name, path in paths.items() if path.is_file()}
        found: dict[str, Part] = broadcast_object(read)
        return found

    def after_cut(self) -> dict[str, Part]:
        """Return every candidate's loss right after pruning, and its task score if a task chooses. Collective over the
        world."""
        names = list(self.candidates)
        known = self._known(self._pruning_mark, names, AfterCut)
        missing = [name for name in names[self.task :: self.tasks] if name not in known]
        if missing:
            known |= self._measure(missing)
        if len(known) < len(names):
            known = self._known(self._pruning_mark, names, AfterCut)
        if len(known) < len(names):
            raise _WaitError(
                f"Measured right after pruning: {len(known)} of {len(names)} candidates. Other tasks measure the rest."
            )
        return known

    def _measure(self, names: Sequence[str]) -> dict[str, Part]:
        context, keys = self.context, self.recipe.score
        model, corpus = context.load_prune_source(DTYPES[keys.dtype]), context.calibration()
        batches = calibration_batches(corpus, micro_batch=keys.micro_batch, dp_rank=0, dp=1)
        by_task = self.keys.choose not in CHOOSE_BY and self.keys.light is None
        return zero_shot(
            model,
            names,
            self.plan,
            [batch.to(context.topology.device) for batch in batches],
            topology=context.topology,
            repair=repair_of(context, model, [self.candidates[name].shape for name in names]),
            score=partial(score_of, context, name=self.keys.choose) if by_task else None,
            tell=lambda name, found: self._write(self._pruning_mark, name, found),
            listener=context.listener,
        )

    def _write(self, mark: str, name: str, part: Part) -> None:
        write_json(self._parts(mark) / f"{name}.json", part)

    def best(self, known: Mapping[str, Part]) -> list[str]:
        """Return the candidates to distil, the lowest loss first."""
        order = sorted(known, key=lambda name: number(known[name]["loss"]))
        light = self.keys.light
        return order[: light.top] if light else []

    @cached_property
    def training(self) -> Context:
        """Context of the light distillation."""
        if self.keys.light is None:
            return self.context
        return replace(self.context, recipe=light_recipe(self.recipe), mark_of=lambda _: self._training_mark)

    def distilled(self, names: Sequence[str]) -> dict[str, Part]:
        """Distil the candidates; return their curves, and scores if a task chooses. Collective over the world."""
        light = self.keys.light
        if light is None:
            return {}
        recipe = self.training.recipe
        steps = recipe.distill.steps(recipe.data.sequence)
        parts: dict[str, Part] = {}

        def train_all(left: Sequence[str], until: int) -> dict[str, Curve]:
            parts.update(self._train_share(left, until, steps))
            trained = {name: parts[name] for name in left if name in parts}
            if self.tasks > 1:
                trained = self._known(self._training_mark, left, Distilled)
            missing = [name for name in left if str(until) not in trained.get(name, {"curve": {}})["curve"]]
            if missing:
                raise _WaitError(
                    f"Distilled to step {until}: {len(left) - len(missing)} of {len(left)} candidates. "
                    "Other tasks distil the rest."
                )
            parts.update(trained)
            return {name: curve_of(parts[name]) for name in left}

        halving(names, rungs(steps, light.halvings), train_all)
        return parts

    def _train_share(self, names: Sequence[str], until: int, steps: int) -> dict[str, Part]:
        share, topology, light = names[self.task :: self.tasks], self.context.topology, self.keys.light
        if light is None or not light.independent_replicas or topology.dp == 1:
            return {name: self._train(self.training, name, until, steps, share) for name in share}
        replica_share = share[topology.dp_rank :: topology.dp]
        with independent_replicas(topology) as alone:
            replica = replace(self.training, topology=alone)
            found = {name: self._train(replica, name, until, steps, replica_share) for name in replica_share}
        return {name: part for each in gather_objects(found) for name, part in each.items()}

    def _train(self, context: Context, name: str, until: int, steps: int, of: Sequence[str]) -> Part:
        """Train one candidate up to a step, from its last checkpoint. Collective over the world of `context`.

        of: the candidates that these ranks train, for the progress display.
        """
        part = self._known(self._training_mark, [name], Distilled).get(name, {"curve": {}})
        scored = self.keys.choose not in CHOOSE_BY and until == steps
        if str(until) in part["curve"] and ("score" in part or not scored):
            return part

        def listen(event: Event) -> None:
            if "validation_loss" in event.values:
                part["curve"][str(event.done)] = finite(event.values["validation_loss"])
                if context.topology.rank == 0:
                    self._write(self._training_mark, name, part)
            done = of.index(name) * steps + event.done
            context.listener(replace(event, done=done, total=len(of) * steps))

        candidate = replace(context, place=name, listener=listen)
        plan = self.plan(name)
        student = cut(candidate, plan)
        refit_candidate(candidate, student, plan)
        try:
            distil(candidate, student, "light", until=until)
            if scored:
                part["score"] = finite(score_of(candidate, student, self.keys.choose))
        except TrainingError:  # a candidate whose training diverges ranks last; the search goes on
            part |= {"curve": part["curve"] | {str(until): None}, "score": None}
        if context.topology.rank == 0:
            self._write(self._training_mark, name, part)
        return part

    def conclude(self, losses: Mapping[str, Part], trained: Mapping[str, Part]) -> Result:
        """Choose the winner, write the table and return the stage's result."""
        rows = [self._row(each, losses[name], trained.get(name, {})) for name, each in self.candidates.items()]
        last = max((step for part in trained.values() for step in curve_of(part)), default=None)
        running = {row["name"]: row for row in rows if last is None or str(last) in row["curve"]}
        costs = list(self.keys.budget.limits())
        points = {
            name: (row["loss"], *(_minimised(cost, row["costs"][cost]) for cost in costs))
            for name, row in running.items()
            if row["loss"] is not None
        }
        winner, best = self._winner(running, points), set(front(points))
        for row in rows:
            row["front"], row["winner"] = row["name"] in best, row["name"] == winner
        order = sorted(rows, key=lambda row: (row["name"] not in running, -_last(row), number(row["loss"])))
        curves = {name: curve_of(part) for name, part in trained.items()}
        if self.context.topology.rank == 0:
            table = {"by": self._by, "costs": costs, "candidates": order, "settled": settled(curves)}
            write_json(self.context.folders.search_table, table)
        chosen, whole = self._widths(self.candidates[winner]), self.scores.shape
        found = next(row for row in rows if row["winner"])
        return {
            "winner": winner,
            "by": self._by,
            "loss": found["loss"],
            "sizes": {axis: size for axis, size in chosen.items() if size != whole.axis_size(axis)},
            "layers": found["layers"],
            "candidates": len(rows),
            "distilled": len(trained),
        }

    @property
    def _by(self) -> str:
        return "hand" if self.keys.winner else str(self.keys.choose)

    def _row(self, candidate: Candidate, measured: Part, trained: Part) -> Part:
        curve = trained.get("curve", {})
        return {
            "name": candidate.name,
            "sizes": dict(candidate.sizes),
            "layers": self.layers(candidate.name),
            "costs": dict(candidate.costs),
            "after_cut": measured["loss"],
            "curve": curve,
            "loss": curve[max(curve, key=int)] if curve else measured["loss"],
            "score": trained.get("score", measured.get("score")),
        }

    def _winner(self, running: Mapping[str, Part], points: Mapping[str, tuple[float, ...]]) -> str:
        keys = self.keys
        if keys.winner:
            if keys.winner not in self.candidates:
                raise RecipeError(
                    f"search.winner {keys.winner!r} is not a candidate.{did_you_mean(keys.winner, self.candidates)} "
                    f"{self.context.folders.search_table} lists them."
                )
            return str(keys.winner)
        if not points:
            raise RecipeError("no candidate has a finite loss. Check the teacher's weights, or score in float32.")
        if keys.choose == "pareto":
            return knee({name: point[:2] for name, point in points.items()})
        if keys.choose == "loss":
            return min(points, key=lambda name: points[name][0])
        scores = {name: score for name, row in running.items() if (score := finite(row["score"])) is not None}
        if not scores:
            raise RecipeError(f"no candidate has a finite score at {keys.choose}. Set search.choose to loss.")
        return max(scores, key=lambda name: scores[name])


def _last(row: Part) -> int:
    return max((int(step) for step in row["curve"]), default=0)


def _minimised(cost: str, value: float) -> float:
    """Return the cost, negated if more is better."""
    return -value if cost in MORE_IS_BETTER else value


SEARCH = Stage(
    "search",
    search_shapes,
    result=Searched,
    makes=lambda run: run.search_table,
    reads=("search",),
    after=("prepare", "calibrate", "correct", "score"),
    wanted=lambda recipe: recipe.search is not None,
    extra_inputs=search_inputs,
    decides=decided,
    keeps=lambda run, mark: run.search_parts,
)
