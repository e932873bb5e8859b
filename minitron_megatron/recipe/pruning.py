"""The work of the stages `score` and `prune`: what is measured on the teacher, and the plan that comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..convert import read_config
from ..data import Batch
from ..errors import CheckpointError
from ..evaluate import Run
from ..files import checksum
from ..layout import PER_LAYER
from ..model import config_of
from ..parallel import fail_together
from ..prune import choose, choose_layers, first_plan, merge_heads, random_plan, trim
from ..records import DepthScores, Plan, Scores
from ..score import block_importance, leave_out, score
from .context import DTYPES, Context
from .sizes import depth_sweep, rounds, statistic_of
from .tasks import winogrande

__all__ = ["composed", "cut", "decide", "load_depth", "load_scores", "measure", "measure_depth"]


def measure(context: Context, model: Any, batches: Sequence[Batch], model_hash: str = "") -> Scores:
    """Importance of every width that the recipe may cut. Collective over the world."""
    return score(
        model,
        batches,
        topology=context.topology,
        statistic=statistic_of(context.recipe),
        model_hash=model_hash,
        listener=context.listener,
    )


def measure_depth(context: Context, model: Any, batches: Sequence[Batch]) -> DepthScores | None:
    """Importance of layers, where the recipe asks for it or its plan needs it. Collective over the world."""
    sweep = depth_sweep(context.recipe, config_of(model[0]).shape)
    if sweep is None:
        return None
    options: dict[str, Any] = {"topology": context.topology, "lengths": sweep.lengths, "listener": context.listener}
    options["model_hash"] = context.uncut_hash
    if sweep.metric == "bi":
        return block_importance(model, batches, **options)
    metric: Any = sweep.metric
    if metric == "winogrande":

        def metric(run: Run) -> float:
            return winogrande(context, model, run)

        metric.__name__ = "winogrande"
    return leave_out(model, batches, metric=metric, greedy=sweep.greedy, **options)


def decide(context: Context) -> Plan:
    """The cut of the teacher, from what the score stage left. Collective over the world.

    With several `prune.iterations` the teacher is loaded, cut and scored again between them, and the plan is the one
    that does at once what the rounds did. Raises CheckpointError for scores of another model.
    """
    keys, teacher = context.recipe.prune, read_config(context.uncut).shape
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
    """The plan after more rounds, in the dtype of scoring."""
    model, step = context.load_uncut(DTYPES[context.recipe.score.dtype]), plan
    batches = context.calibration_batches()
    for sizes in others:
        model = trim(model, step, context.topology)
        scores = measure(context, model, batches)
        step = choose(scores, layers=None, scope=context.recipe.prune.scope, **sizes)
        plan = composed(plan, step)
    return plan


def cut(context: Context, plan: Plan) -> list[Any]:
    """The teacher, cut by its plan. Collective over the world."""
    keys, model = context.recipe.prune, context.load_uncut()
    if keys.merge != "none":
        with fail_together():
            scores = load_scores(context)
        merge_heads(model, scores, plan, context.topology, merge=keys.merge, sign=keys.merge_sign)
    return trim(model, plan, context.topology)


def composed(first: Plan, second: Plan) -> Plan:
    """The plan that does at once what two do, the second on the model that the first leaves. Margins: the lesser."""
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
    """The layers that stay; None: all of the teacher's."""
    keys = context.recipe.prune
    if not isinstance(keys.layers, int):
        return keys.layers
    if keys.layers == layers:
        return None
    return choose_layers(load_depth(context), keep=keys.layers, contiguous=keys.contiguous)


def load_scores(context: Context) -> Scores:
    """What the score stage left. Raises CheckpointError where it is another model's, or was edited since."""
    _expect_recorded(context, context.folders.scores)
    scores = Scores.load(context.folders.scores)
    _expect_teacher(context, scores.model_hash, context.folders.scores)
    return scores


def load_depth(context: Context) -> DepthScores:
    """The same of layers."""
    _expect_recorded(context, context.folders.depth)
    depth = DepthScores.load(context.folders.depth)
    _expect_teacher(context, depth.model_hash, context.folders.depth)
    return depth


def _expect_recorded(context: Context, path: Path) -> None:
    recorded = context.done.get("score", {}).get("files", {}).get(path.name)
    if recorded is not None and path.is_file() and checksum(path) != recorded:
        raise CheckpointError(
            f"{path} has changed since it was measured. Remove {path.parent} and run `minitron score` again."
        )


def _expect_teacher(context: Context, model_hash: str, path: Path) -> None:
    if model_hash != context.uncut_hash:
        raise CheckpointError(
            f"{path} was measured on another model than {context.uncut}. "
            f"Remove {path.parent} and run `minitron score` again."
        )
