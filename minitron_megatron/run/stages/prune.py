"""Choose the units and layers to keep, and prune the teacher to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NotRequired

from typing_extensions import TypedDict

from ...convert import read_config
from ...forecast import rounds
from ...layout import PER_LAYER
from ...model import Chunk
from ...parallel import fail_together
from ...prune import choose, choose_layers, first_plan, merge_heads, random_plan, trim
from ...records import Plan
from ..context import DTYPES, Context
from ..refitting import refitted, write_refit
from ..stage import Model, Result, Stage
from .score import load_depth, load_scores, measure

__all__ = ["PRUNE", "composed", "cut"]


class Refit(TypedDict):
    method: str
    tokens: int
    layers: int
    repaired: int
    """Layers whose weights changed."""


class Pruned(Model):
    trimmed_files: NotRequired[str]
    """The same of the model before its refit."""
    refit: NotRequired[Refit]
    margins: dict[str, float | None]
    by: str
    layers: list[int]
    rounds: list[dict[str, int]]


def do_prune(context: Context) -> Result:
    """Choose the units and layers to keep, and prune the teacher to them."""
    plan = decide(context)
    model = cut(context, plan)
    fits = refitted(context, model, plan)
    folder = context.folders.model("pruned")
    digest = context.save(model, folder)
    with fail_together():
        if context.topology.rank == 0:
            plan.save(context.folders.plan)
    repair = write_refit(context, fits)
    return {
        "hash": digest,
        "files": context.sealed(folder),
        **repair,
        "margins": {axis: min(by.values()) for axis, by in plan.margins.items()},
        "by": context.recipe.prune.by,
        "layers": list(plan.kept_layers),
        "rounds": rounds(context.recipe, plan.shape),
    }


def decide(context: Context) -> Plan:
    """Return the plan that prunes the teacher, from the result of the score stage. Collective over the world.

    With several `prune.iterations` the teacher is loaded, pruned and scored again in each round, and the plan composes
    all rounds into one. Raises CheckpointError for scores of another model.
    """
    keys, teacher = context.recipe.prune, read_config(context.prune_source).shape
    first, *others = rounds(context.recipe, teacher)
    with fail_together():
        layers = _kept_layers(context, teacher.layers)
        if keys.by == "random":
            return random_plan(teacher, context.recipe.seed, layers=layers, **first)
        if keys.by == "first":
            return first_plan(teacher, layers=layers, **first)
        plan = choose(load_scores(context), layers=layers, scope=keys.scope, **first)
    return _further(context, plan, others) if others else plan


def _further(context: Context, plan: Plan, others: Sequence[dict[str, int]]) -> Plan:
    """Return the plan after the other rounds, which run in the dtype of scoring."""
    model, step = context.load_prune_source(DTYPES[context.recipe.score.dtype]), plan
    batches = context.calibration_batches()
    for sizes in others:
        model = trim(model, step, context.topology)
        scores = measure(context, model, batches)
        step = choose(scores, layers=None, scope=context.recipe.prune.scope, **sizes)
        plan = composed(plan, step)
    return plan


def cut(context: Context, plan: Plan) -> list[Chunk]:
    """Load the teacher and prune it by the plan. Collective over the world."""
    keys, model = context.recipe.prune, context.load_prune_source()
    if keys.merge != "none":
        with fail_together():
            scores = load_scores(context)
        merge_heads(model, scores, plan, context.topology, merge=keys.merge, sign=keys.merge_sign)
    return trim(model, plan, context.topology)


def composed(first: Plan, second: Plan) -> Plan:
    """Compose two plans, the second of which is for the model that the first leaves; margins: the smaller one."""
    layers = tuple(first.kept_layers[layer] for layer in second.kept_layers)
    places = dict(zip(layers, second.kept_layers, strict=True))
    keep: dict[str, dict[int | None, tuple[int, ...]]] = {}
    margins: dict[str, dict[int | None, float]] = {}
    for axis in {**first.keep, **second.keep}:
        for layer in layers if axis in PER_LAYER else [None]:
            at = None if layer is None else places[layer]
            before = first.kept_at(axis, layer)
            keep.setdefault(axis, {})[layer] = tuple(before[unit] for unit in second.kept_at(axis, at))
            known = [by[axis][where] for by, where in ((first.margins, layer), (second.margins, at)) if axis in by]
            if known:
                margins.setdefault(axis, {})[layer] = min(known)
    everything = first.layers is None and second.layers is None
    return Plan(first.shape, keep, None if everything else layers, margins, first.model_hash)


def _kept_layers(context: Context, layers: int) -> tuple[int, ...] | None:
    """Return the layers to keep; None: all."""
    keys = context.recipe.prune
    if not isinstance(keys.layers, int):
        return keys.layers
    if keys.layers == layers:
        return None
    return choose_layers(load_depth(context), keep=keys.layers, contiguous=keys.contiguous)


PRUNE = Stage(
    "prune",
    do_prune,
    result=Pruned,
    makes=lambda run: run.model("pruned"),
    makes_too=lambda run: (run.model("trimmed"),),
    reads=("prune", "dtype"),
    after=("prepare", "calibrate", "correct", "score"),
    wanted=lambda recipe: recipe.student is None,
)
