"""Sizes and measurements that a recipe's `score` and `prune` keys imply for a teacher, from its shape alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from ..convert import read_config
from ..errors import PlanError, RecipeError
from ..layout import Shape
from ..model import check_fits
from ..parallel import Topology
from ..prune import check_merge, checked_sizes
from ..recipe import Depth, Recipe
from ..records import Plan
from ..score import DEPTH_METRICS, check_statistic
from .candidates import candidates_of, check_candidates

__all__ = [
    "DepthSweep",
    "check_pruning",
    "depth_sweep",
    "measures_depth",
    "round_shapes",
    "rounds",
    "scores_wanted",
    "student_shape",
]

ROUND_MULTIPLE = 64
"""Intermediate sizes are multiples of the common divisor of the first and last size and this number, so that they fit
the same layouts."""


@dataclass(frozen=True)
class DepthSweep:
    """Settings of the measurement of layers."""

    metric: str
    lengths: tuple[int, ...]
    """Lengths of the blocks that are left out."""
    greedy: int
    """Layers to remove one by one."""


def student_shape(recipe: Recipe, teacher: Shape) -> Shape:
    """Return the student's shape; before a search has ended, that of the largest candidate. Raises PlanError for
    impossible sizes."""
    if recipe.student:
        return read_config(recipe.student).shape
    if recipe.search:
        return candidates_of(recipe, teacher)[0].shape
    sizes, layers = checked_sizes(teacher, recipe.prune.sizes()), recipe.prune.layers
    if not isinstance(layers, int):
        return Plan(teacher, layers=layers).target.resized(**sizes)
    if layers > teacher.layers:
        raise PlanError(
            f"prune.layers is {layers}, but the teacher has {teacher.layers} layers. Use 1 to {teacher.layers}."
        )
    return teacher.resized(layers=layers, **sizes)


def rounds(recipe: Recipe, teacher: Shape) -> list[dict[str, int]]:
    """Return the widths after each of `prune.iterations` rounds: even steps, rounded, to the requested sizes."""
    count, sizes = recipe.prune.iterations, recipe.prune.sizes()

    def after(at: int, axis: str) -> int:
        span, unit = teacher.axis_size(axis) - sizes[axis], _unit(axis, teacher, sizes[axis], count)
        return sizes[axis] + unit * round(span * (count - at) / (count * unit))

    return [{axis: after(at, axis) for axis in sizes} for at in range(1, count + 1)]


def round_shapes(recipe: Recipe, teacher: Shape) -> list[Shape]:
    """Return the model's shape after each round."""
    layers = student_shape(recipe, teacher).layers
    return [teacher.resized(layers=layers, **checked_sizes(teacher, sizes)) for sizes in rounds(recipe, teacher)]


def _unit(axis: str, teacher: Shape, size: int, count: int) -> int:
    """Return the unit of intermediate sizes. It does not depend on the layout."""
    if axis == "heads" and teacher.heads != teacher.kv_groups:
        return teacher.kv_groups
    unit = gcd(teacher.axis_size(axis), size, ROUND_MULTIPLE)
    while unit > 1 and unit * count > teacher.axis_size(axis) - size:
        unit //= 2
    return unit


def scores_wanted(recipe: Recipe) -> bool:
    """Whether units or layers are chosen by importance."""
    return recipe.student is None and (recipe.prune.by == "importance" or measures_depth(recipe))


def measures_depth(recipe: Recipe) -> bool:
    """Whether the importance of layers is measured."""
    searched = recipe.search is not None and recipe.search.layers is not None
    return recipe.score.depth is not None or isinstance(recipe.prune.layers, int) or searched


def depth_sweep(recipe: Recipe, teacher: Shape) -> DepthSweep | None:
    """Return the settings of the measurement of layers; None: they are not measured."""
    if not measures_depth(recipe):
        return None
    keys, lengths = recipe.score.depth or Depth(), set((recipe.score.depth or Depth()).lengths)
    go = [teacher.layers - layers for layers in _depths(recipe) if layers < teacher.layers]
    lengths.update(go if recipe.prune.contiguous else {1} if go else ())
    one_by_one = max(go, default=teacher.layers - student_shape(recipe, teacher).layers) if keys.greedy else 0
    return DepthSweep(keys.metric, tuple(sorted(lengths or {1})), one_by_one)


def _depths(recipe: Recipe) -> set[int]:
    """Return the possible numbers of kept layers, if the recipe gives numbers and not a list of layers."""
    if recipe.search:  # regardless of the budget, so that editing it needs no new scores
        return set(recipe.search.layers or ())
    return {recipe.prune.layers} if isinstance(recipe.prune.layers, int) else set()


def check_pruning(recipe: Recipe, teacher: Shape, topology: Topology) -> None:
    """Raise RecipeError, PlanError or TopologyError if the teacher cannot be scored, pruned or distilled as the recipe
    says. Not collective."""
    if recipe.search:
        check_candidates(recipe, teacher, topology)
    check_fits(student_shape(recipe, teacher), topology)
    if scores_wanted(recipe):
        check_statistic(recipe.score.statistic, teacher)
    if recipe.prune.merge != "none" and recipe.prune.by != "importance":
        raise RecipeError(f"prune.merge needs scores, but prune.by: {recipe.prune.by} has none. Set merge to none.")
    if recipe.prune.merge != "none":
        check_merge(teacher, student_shape(recipe, teacher), recipe.prune.merge)
    _check_depth(recipe, teacher)
    _check_rounds(recipe, teacher, topology)
    if recipe.distill.states:
        recipe.distill.states.check(teacher, student_shape(recipe, teacher), topology)


def _check_depth(recipe: Recipe, teacher: Shape) -> None:
    keys = recipe.score.depth
    if keys is None:
        return
    if any(length >= teacher.layers for length in keys.lengths):
        raise RecipeError(
            f"score.depth.lengths is {list(keys.lengths)}, but the teacher has {teacher.layers} layers. "
            f"Use lengths from 1 to {teacher.layers - 1}."
        )
    if keys.greedy and DEPTH_METRICS[keys.metric].one_pass:
        raise RecipeError(
            f"score.depth.greedy does not work with metric {keys.metric}. Use metric loss or kl, or greedy: false."
        )
    if keys.greedy and min([student_shape(recipe, teacher).layers, *_depths(recipe)]) == teacher.layers:
        raise RecipeError(
            "score.depth.greedy removes as many layers as prune.layers does, but prune.layers keeps all. "
            "Set prune.layers, or greedy: false."
        )


def _check_rounds(recipe: Recipe, teacher: Shape, topology: Topology) -> None:
    keys = recipe.prune
    if keys.iterations == 1:
        return
    if keys.by != "importance" or not keys.sizes():
        why = f"prune.by: {keys.by} needs no scores" if keys.by != "importance" else "no width is pruned"
        raise RecipeError(f"prune.iterations is {keys.iterations}, but {why}. Set it to 1.")
    most = max(teacher.axis_size(axis) - size for axis, size in keys.sizes().items())
    if keys.iterations > max(most, 1):
        raise RecipeError(f"prune.iterations is {keys.iterations}, but no axis loses more than {most}. Lower it.")
    for shape in round_shapes(recipe, teacher):
        check_fits(shape, topology)
