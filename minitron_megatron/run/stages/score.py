"""Measure the importance of units and layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from typing_extensions import TypedDict

from ...data import Batch
from ...errors import CheckpointError
from ...evaluate import Task
from ...files import checksum
from ...forecast import depth_sweep
from ...model import Chunk, shape_of
from ...parallel import broadcast_object
from ...recipe import Recipe
from ...records import DepthScores, Scores
from ...score import DEPTH_METRICS, score
from ..context import DTYPES, Context
from ..fingerprint import task_marks
from ..measure_tasks import depth_metric
from ..stage import Result, Stage

__all__ = ["SCORE", "load_depth", "load_scores", "measure"]

AnyScores = TypeVar("AnyScores", Scores, DepthScores)


class Scored(TypedDict):
    samples: int
    tokens: int
    statistic: dict[str, str]
    depth: str | None
    files: dict[str, str]


def do_score(context: Context) -> Result:
    """Measure the importance of units, and of layers where needed, and save both."""
    keys, folders = context.recipe.score, context.folders
    model, batches = context.load_prune_source(DTYPES[keys.dtype]), context.calibration_batches()
    scores = measure(context, model, batches, context.prune_source_hash)
    depth = measure_depth(context, model, batches)
    files: dict[str, str] = {}
    if context.topology.rank == 0:
        scores.save(folders.scores)
        folders.depth.unlink(missing_ok=True)
        if depth is not None:
            depth.save(folders.depth)
        files = {path.name: checksum(path) for path in (folders.scores, folders.depth) if path.exists()}
    result = {"samples": scores.samples, "tokens": scores.tokens, "statistic": keys.statistic.model_dump()}
    return result | {"depth": depth.metric if depth else None, "files": broadcast_object(files)}


def measure(context: Context, model: list[Chunk], batches: Sequence[Batch], model_hash: str = "") -> Scores:
    """Return the importance of every unit of every width axis. Collective over the world."""
    return score(
        model,
        batches,
        topology=context.topology,
        statistic=context.recipe.score.statistic,
        model_hash=model_hash,
        listener=context.listener,
    )


def measure_depth(context: Context, model: list[Chunk], batches: Sequence[Batch]) -> DepthScores | None:
    """Return the importance of layers, if `score.depth`, `prune.layers` or a search needs it. Collective over the
    world."""
    sweep = depth_sweep(context.recipe, shape_of(model[0]))
    if sweep is None:
        return None
    options: dict[str, Any] = {"topology": context.topology, "lengths": sweep.lengths, "listener": context.listener}
    options["model_hash"] = context.prune_source_hash
    metric = DEPTH_METRICS[sweep.metric]
    if not metric.one_pass:
        options["greedy"] = sweep.greedy
    if isinstance(metric.task, Task):
        options["metric"] = depth_metric(context, model, metric.task)
    return metric.sweep(model, batches, **options)


def depth_keys(recipe: Recipe) -> list[object] | None:
    """Return the inputs of the measurement of layers other than the keys `score`; None: layers are not measured."""
    if not recipe.measures_layers:
        return None
    by_task = recipe.score.depth is not None and DEPTH_METRICS[recipe.score.depth.metric].task is not None
    task = [recipe.evaluate.limit, recipe.evaluate.truncate, task_marks(recipe)] if by_task else None
    layers = recipe.search.layers if recipe.search else recipe.prune.layers
    return [layers, recipe.prune.contiguous, task]


def score_inputs(recipe: Recipe) -> object:
    """Return the inputs of the scores other than the keys `score`: those of layers, and which teacher is measured."""
    of_layers = depth_keys(recipe)
    original = recipe.corrects_first and recipe.prune.teacher == "original"
    return [of_layers, "original"] if original else of_layers


def load_scores(context: Context) -> Scores:
    """Load the scores of the score stage. Raises CheckpointError if they belong to another model or were edited."""
    return _loaded(context, Scores, context.folders.scores)


def load_depth(context: Context) -> DepthScores:
    """Load the scores of layers, with the same checks."""
    return _loaded(context, DepthScores, context.folders.depth)


def _loaded(context: Context, kind: type[AnyScores], path: Path) -> AnyScores:
    again = f"Remove {path.parent} and run `minitron score` again."
    recorded = context.done.get("score", {}).get("files", {}).get(path.name)
    if recorded is not None and path.is_file() and checksum(path) != recorded:
        raise CheckpointError(f"{path} has changed since it was measured. {again}")
    scores = kind.load(path)
    if scores.model_hash != context.prune_source_hash:
        raise CheckpointError(f"{path} was measured on a model other than {context.prune_source}. {again}")
    return scores


SCORE = Stage(
    "score",
    do_score,
    result=Scored,
    makes=lambda run: run.scores.parent,
    reads=("score",),
    after=("prepare", "calibrate", "correct"),
    wanted=lambda recipe: recipe.needs_scores,
    extra_inputs=score_inputs,
)
