"""The stage `search`: candidates are measured right after their cut, the best are distilled a little, one is chosen.

What is known of a candidate lies in a file of its own, so that a killed search, an edited grid, and tasks of an array
that share one run folder measure nothing twice.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ..convert import read_config
from ..data import calibration_batches
from ..errors import RecipeError, TrainingError, did_you_mean
from ..events import Event
from ..files import checksum, write_json
from ..parallel import apart, broadcast_object, fail_together, gather_objects, place_in_world
from ..prune import choose, choose_layers
from ..records import DepthScores, Plan, Scores
from ..search import MORE_IS_BETTER, Candidate, Curve, front, halving, knee, rungs, settled, zero_shot
from .candidates import candidates_of
from .context import DTYPES, Context
from .fingerprint import digest, task_marks, untimed
from .parts import AfterCut, Distilled, Part, curve_of, finite, number, read_part
from .pruning import load_depth, load_scores
from .refitting import cut_and_refitted, repair_of
from .schema import Recipe
from .tasks import score_of
from .training import distil, distillation_asks

__all__ = ["BY", "PARTS", "decided", "light_recipe", "search_asks", "search_shapes", "search_share"]

TABLE, PARTS = "table.json", "parts"

BY = ("loss", "pareto")
"""What may choose besides a task."""


def search_shapes(context: Context) -> dict[str, Any]:
    """Measures every candidate, chooses one and writes the table: what the stage leaves. Collective over the world."""
    work = _Work(context)
    losses = work.after_cut()
    curves = work.distilled(work.best(losses))
    result = work.conclude(losses, curves)
    if context.topology.rank == 0:
        shutil.rmtree(work.training.checkpoints(work.training.recipe), ignore_errors=True)
    return result


def search_share(context: Context, task: int, tasks: int) -> str:
    """One task's share of what can be measured now, of so many; a sentence on what is left. Collective over the world.

    The candidates are dealt out in turn. What needs the measurements of other tasks waits until they are there: start
    the tasks again, or the stage itself, which does what is left.
    """
    work = _Work(context, task, tasks)
    try:
        work.distilled(work.best(work.after_cut()))
    except _WaitError as left:
        return str(left)
    return "Every candidate is measured. `minitron search` chooses."


def search_asks(recipe: Recipe) -> Any:
    """What a search reads besides its keys: how its candidates are cut, and trained."""
    if recipe.search is None:
        return None
    table = recipe.search.serving.table
    told = [_cut_by(recipe), checksum(table) if table else None, _chosen_by(recipe)]
    return told if recipe.search.light is None else [*told, _light_asks(recipe)]


def _light_asks(recipe: Recipe) -> Any:
    """What the light distillation of a candidate depends on, and the held-out text that its curve is measured on."""
    light = light_recipe(recipe)
    return [light.distill.deciding(), light.dtype, distillation_asks(light), recipe.evaluate.samples]


def _chosen_by(recipe: Recipe) -> Any:
    """All that a candidate's score depends on, where a task chooses."""
    assert recipe.search is not None
    keys = recipe.search
    return None if keys.choose in BY else [keys.choose, recipe.evaluate.deciding(), task_marks(recipe)]


def _cut_by(recipe: Recipe) -> dict[str, Any]:
    refit = set() if recipe.prune.refit == "none" else {"refit", "refit_samples", "refit_ridge"}
    return recipe.prune.model_dump(include={"scope", "contiguous", "teacher", *refit})


def decided(recipe: Recipe, result: Mapping[str, Any]) -> Recipe:
    """The recipe as if it had named the winner's sizes."""
    layers = None if result["layers"] is None else tuple(result["layers"])
    prune = recipe.prune.model_copy(update={**result["sizes"], "layers": layers})
    return recipe.model_copy(update={"prune": prune, "search": None})


def light_recipe(recipe: Recipe) -> Recipe:
    """The recipe whose distillation is the light one."""
    assert recipe.search is not None and recipe.search.light is not None
    keys = recipe.search.light
    given = keys.model_dump(exclude_none=True, exclude={"top", "halvings", "measure_every", "apart"})
    given |= {"validate_every": keys.measure_every, "save_every": keys.measure_every, "save_async": False}
    distill = recipe.distill.model_copy(update={**given, "phases": (), "start": None, "retain": False})
    return recipe.model_copy(update={"distill": distill})


class _WaitError(Exception):
    """Other tasks have not measured yet what comes next."""


@dataclass(frozen=True)
class _Work:
    """A search at work: all of it, or one task's share."""

    context: Context
    task: int = 0
    tasks: int = 1

    @property
    def recipe(self) -> Recipe:
        return self.context.recipe

    @property
    def keys(self) -> Any:
        assert self.recipe.search is not None
        return self.recipe.search

    @cached_property
    def candidates(self) -> dict[str, Candidate]:
        teacher = read_config(self.context.uncut).shape
        return {each.name: each for each in candidates_of(self.recipe, teacher)}

    @cached_property
    def scores(self) -> Scores:
        return load_scores(self.context)

    @cached_property
    def depth(self) -> DepthScores:
        return load_depth(self.context)

    def plan(self, name: str) -> Plan:
        """The cut of a candidate: all are cut by one set of scores."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of ties: the winner's cut warns when it is made
            widths, scope = self._widths(self.candidates[name]), self.recipe.prune.scope
            return choose(self.scores, layers=self.layers(name), scope=scope, **widths)

    def layers(self, name: str) -> tuple[int, ...] | None:
        """Those that a candidate keeps; None: all."""
        keep = self.candidates[name].shape.layers
        if keep == self.scores.shape.layers:
            return None
        return choose_layers(self.depth, keep=keep, contiguous=self.recipe.prune.contiguous)

    def _widths(self, candidate: Candidate) -> dict[str, int]:
        return {axis: size for axis, size in candidate.sizes.items() if axis != "layers"}

    @cached_property
    def _measured_by(self) -> str:
        """A number for all that a candidate's loss right after the cut depends on, besides the candidate."""
        return digest([untimed(self.context.done), _cut_by(self.recipe), _chosen_by(self.recipe)])

    @cached_property
    def _trained_by(self) -> str:
        """And for all that its curve depends on."""
        return digest([self._measured_by, _light_asks(self.recipe)])

    def _parts(self, mark: str) -> Path:
        return self.context.folders.search / PARTS / mark[:16]

    def _known(self, mark: str, names: Sequence[str], kind: Any) -> dict[str, Part]:
        """What the first rank finds of candidates, on every rank. Collective over the world. Raises FileError for a
        file that does not hold it."""
        paths = {name: self._parts(mark) / f"{name}.json" for name in names}
        mine: dict[str, Part] = {}
        with fail_together():
            if place_in_world()[0] == 0:
                mine = {name: read_part(path, kind) for name, path in paths.items() if path.is_file()}
        found: dict[str, Part] = broadcast_object(mine)
        return found

    def after_cut(self) -> dict[str, Part]:
        """The loss, and the score where a task chooses, of every candidate. Collective over the world."""
        names = list(self.candidates)
        known = self._known(self._measured_by, names, AfterCut)
        mine = [name for name in names[self.task :: self.tasks] if name not in known]
        if mine:
            known |= self._measure(mine)
        if len(known) < len(names):
            known = self._known(self._measured_by, names, AfterCut)
        if len(known) < len(names):
            raise _WaitError(f"{len(known)} of {len(names)} candidates are measured right after their cut.")
        return known

    def _measure(self, names: Sequence[str]) -> dict[str, Part]:
        context, keys = self.context, self.recipe.score
        model, corpus = context.load_uncut(DTYPES[keys.dtype]), context.calibration()
        batches = calibration_batches(corpus, micro_batch=keys.micro_batch, dp_rank=0, dp=1)
        by_task = self.keys.choose not in BY and self.keys.light is None
        return zero_shot(
            model,
            names,
            self.plan,
            [batch.to(context.topology.device) for batch in batches],
            topology=context.topology,
            repair=repair_of(context, model),
            score=partial(score_of, context, name=self.keys.choose) if by_task else None,
            tell=lambda name, found: self._note(self._measured_by, name, found),
            listener=context.listener,
        )

    def _note(self, mark: str, name: str, part: Part) -> None:
        write_json(self._parts(mark) / f"{name}.json", part)

    def best(self, known: Mapping[str, Part]) -> list[str]:
        """Those that are distilled, the least loss first."""
        order = sorted(known, key=lambda name: number(known[name]["loss"]))
        light = self.keys.light
        return order[: light.top] if light else []

    @cached_property
    def training(self) -> Context:
        """As the candidates see it that are distilled."""
        if self.keys.light is None:
            return self.context
        return replace(self.context, recipe=light_recipe(self.recipe), mark_of=lambda _: self._trained_by)

    def distilled(self, names: Sequence[str]) -> dict[str, Part]:
        """The curve of each, and its score where a task chooses. Collective over the world."""
        light = self.keys.light
        if light is None:
            return {}
        recipe = self.training.recipe
        steps = recipe.distill.steps(recipe.data.sequence)
        parts: dict[str, Part] = {}

        def train_all(left: Sequence[str], until: int) -> dict[str, Curve]:
            parts.update(self._train_share(left, until, steps))
            there = {name: parts[name] for name in left if name in parts}
            if self.tasks > 1:
                there = self._known(self._trained_by, left, Distilled)
            waits = [name for name in left if str(until) not in there.get(name, {"curve": {}})["curve"]]
            if waits:
                raise _WaitError(f"{len(left) - len(waits)} of {len(left)} candidates are distilled to step {until}.")
            parts.update(there)
            return {name: curve_of(parts[name]) for name in left}

        halving(names, rungs(steps, light.halvings), train_all)
        return parts

    def _train_share(self, names: Sequence[str], until: int, steps: int) -> dict[str, Part]:
        mine, topology = names[self.task :: self.tasks], self.context.topology
        if not self.keys.light.apart or topology.dp == 1:
            return {name: self._train(self.training, name, until, steps, mine) for name in mine}
        own = mine[topology.dp_rank :: topology.dp]
        with apart(topology) as alone:
            replica = replace(self.training, topology=alone)
            found = {name: self._train(replica, name, until, steps, own) for name in own}
        return {name: part for each in gather_objects(found) for name, part in each.items()}

    def _train(self, context: Context, name: str, until: int, steps: int, of: Sequence[str]) -> Part:
        """One candidate, from wherever it stands up to a step. Collective over the world of `context`."""
        part = self._known(self._trained_by, [name], Distilled).get(name, {"curve": {}})
        scored = self.keys.choose not in BY and until == steps
        if str(until) in part["curve"] and ("score" in part or not scored):
            return part

        def listen(event: Event) -> None:
            if "validation_loss" in event.values:
                part["curve"][str(event.done)] = finite(event.values["validation_loss"])
                if context.topology.rank == 0:
                    self._note(self._trained_by, name, part)
            done = of.index(name) * steps + event.done
            context.listener(replace(event, done=done, total=len(of) * steps))

        own = replace(context, place=name, listener=listen)
        student = cut_and_refitted(own, self.plan(name))
        try:
            distil(own, student, "light", until=until)
            if scored:
                part["score"] = finite(score_of(own, student, self.keys.choose))
        except TrainingError:  # a candidate that training destroys is the worst one, and no end of the search
            part |= {"curve": part["curve"] | {str(until): None}, "score": None}
        if context.topology.rank == 0:
            self._note(self._trained_by, name, part)
        return part

    def conclude(self, losses: Mapping[str, Part], trained: Mapping[str, Part]) -> dict[str, Any]:
        """Writes the table, and returns what the stage leaves."""
        rows = [self._row(each, losses[name], trained.get(name, {})) for name, each in self.candidates.items()]
        last = max((step for part in trained.values() for step in curve_of(part)), default=None)
        running = {row["name"]: row for row in rows if last is None or str(last) in row["curve"]}
        costs = list(self.keys.budget.limits())
        points = {
            name: (row["loss"], *(_less(cost, row["costs"][cost]) for cost in costs))
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
            write_json(self.context.folders.search / TABLE, table)
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

    def _row(self, candidate: Candidate, measured: Part, trained: Part) -> dict[str, Any]:
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

    def _winner(self, running: Mapping[str, Mapping[str, Any]], points: Mapping[str, tuple[float, ...]]) -> str:
        keys = self.keys
        if keys.winner:
            if keys.winner not in self.candidates:
                raise RecipeError(
                    f"search.winner {keys.winner!r} is no candidate.{did_you_mean(keys.winner, self.candidates)} "
                    f"{self.context.folders.search / TABLE} lists them."
                )
            return str(keys.winner)
        if not points:
            raise RecipeError("no candidate has a loss that is finite. Look for broken weights, or score in float32.")
        if keys.choose == "pareto":
            return knee({name: point[:2] for name, point in points.items()})
        if keys.choose == "loss":
            return min(points, key=lambda name: points[name][0])
        scores = {name: score for name, row in running.items() if (score := finite(row["score"])) is not None}
        if not scores:
            raise RecipeError(f"no candidate has a score at {keys.choose} that is finite. Choose by loss.")
        return max(scores, key=lambda name: scores[name])


def _last(row: Mapping[str, Any]) -> int:
    return max((int(step) for step in row["curve"]), default=0)


def _less(cost: str, value: float) -> float:
    """What there should be little of."""
    return -value if cost in MORE_IS_BETTER else value
