"""What the `score` and `prune` keys of a recipe ask of a teacher: counted from its shape alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from ..errors import PlanError, RecipeError
from ..layout import Shape
from ..model import check_fits
from ..parallel import Topology
from ..prune import check_merge, checked_sizes
from ..recipe import Depth, Recipe
from ..records import Plan, Statistic
from ..score import check_statistic
from .candidates import candidates_of, check_candidates

__all__ = [
    "DepthSweep",
    "check_pruning",
    "depth_sweep",
    "measures_depth",
    "round_shapes",
    "rounds",
    "scores_wanted",
    "statistic_of",
    "student_shape",
]

ROUND_MULTIPLE = 64
"""Sizes between two rounds are multiples of what divides both ends, up to this, so that they fit where these do."""


@dataclass(frozen=True)
class DepthSweep:
    """How layers are measured."""

    metric: str
    lengths: tuple[int, ...]
    greedy: int
    """Layers to take one by one."""


def student_shape(recipe: Recipe, teacher: Shape) -> Shape:
    """What the recipe makes of a teacher; before a search has ended, the largest that it may. Raises PlanError where it
    cannot."""
    if recipe.search:
        return candidates_of(recipe, teacher)[0].shape
    sizes, layers = checked_sizes(teacher, recipe.prune.sizes()), recipe.prune.layers
    if not isinstance(layers, int):
        return Plan(teacher, layers=layers).target.resized(**sizes)
    if layers > teacher.layers:
        raise PlanError(f"axis layers should keep {layers} of {teacher.layers}. Ask for 1 to {teacher.layers}.")
    return teacher.resized(layers=layers, **sizes)


def rounds(recipe: Recipe, teacher: Shape) -> list[dict[str, int]]:
    """The widths after each of `prune.iterations` rounds: evenly spaced but for rounding, the last as asked."""
    count, sizes = recipe.prune.iterations, recipe.prune.sizes()

    def after(at: int, axis: str) -> int:
        span, unit = teacher.axis_size(axis) - sizes[axis], _unit(axis, teacher, sizes[axis], count)
        return sizes[axis] + unit * round(span * (count - at) / (count * unit))

    return [{axis: after(at, axis) for axis in sizes} for at in range(1, count + 1)]


def round_shapes(recipe: Recipe, teacher: Shape) -> list[Shape]:
    """The model after each round."""
    layers = student_shape(recipe, teacher).layers
    return [teacher.resized(layers=layers, **checked_sizes(teacher, sizes)) for sizes in rounds(recipe, teacher)]


def _unit(axis: str, teacher: Shape, size: int, count: int) -> int:
    """What sizes between the rounds are multiples of: the layout has no say in it."""
    if axis == "heads" and teacher.heads != teacher.kv_groups:
        return teacher.kv_groups
    unit = gcd(teacher.axis_size(axis), size, ROUND_MULTIPLE)
    while unit > 1 and unit * count > teacher.axis_size(axis) - size:
        unit //= 2
    return unit


def scores_wanted(recipe: Recipe) -> bool:
    """Whether anything is chosen by importance, of units or of layers."""
    return recipe.prune.by == "importance" or measures_depth(recipe)


def measures_depth(recipe: Recipe) -> bool:
    searched = recipe.search is not None and recipe.search.layers is not None
    return recipe.score.depth is not None or isinstance(recipe.prune.layers, int) or searched


def depth_sweep(recipe: Recipe, teacher: Shape) -> DepthSweep | None:
    """How the recipe has layers measured; None: not at all."""
    if not measures_depth(recipe):
        return None
    keys, lengths = recipe.score.depth or Depth(), set((recipe.score.depth or Depth()).lengths)
    go = [teacher.layers - layers for layers in _depths(recipe) if layers < teacher.layers]
    lengths.update(go if recipe.prune.contiguous else {1} if go else ())
    one_by_one = max(go, default=teacher.layers - student_shape(recipe, teacher).layers) if keys.greedy else 0
    return DepthSweep(keys.metric, tuple(sorted(lengths or {1})), one_by_one)


def _depths(recipe: Recipe) -> set[int]:
    """The numbers of layers that may stay, where the recipe says how many and not which."""
    if recipe.search:  # whatever the budget: an edited one asks for no new scores
        return set(recipe.search.layers or ())
    return {recipe.prune.layers} if isinstance(recipe.prune.layers, int) else set()


def statistic_of(recipe: Recipe) -> Statistic:
    """How activations add up."""
    return Statistic(**recipe.score.statistic.model_dump())


def check_pruning(recipe: Recipe, teacher: Shape, topology: Topology) -> None:
    """Raises RecipeError, PlanError or TopologyError where a teacher cannot be scored and cut so, or cannot teach so.

    Not collective.
    """
    if recipe.search:
        check_candidates(recipe, teacher, topology)
    check_fits(student_shape(recipe, teacher), topology)
    if scores_wanted(recipe):
        check_statistic(statistic_of(recipe), teacher)
    if recipe.prune.merge != "none" and recipe.prune.by != "importance":
        raise RecipeError(f"prune.merge ranks heads by scores, and by: {recipe.prune.by} has none. Set it to none.")
    if recipe.prune.merge != "none":
        check_merge(teacher, student_shape(recipe, teacher), recipe.prune.merge)
    _check_depth(recipe, teacher)
    _check_rounds(recipe, teacher, topology)
    if recipe.distill.states:
        recipe.distill.states.pairs().check(teacher, student_shape(recipe, teacher), topology)


def _check_depth(recipe: Recipe, teacher: Shape) -> None:
    keys = recipe.score.depth
    if keys is None:
        return
    if any(length >= teacher.layers for length in keys.lengths):
        raise RecipeError(
            f"score.depth.lengths is {list(keys.lengths)}, and {teacher.layers} layers are there. "
            f"Ask for blocks of 1 to {teacher.layers - 1}."
        )
    if keys.greedy and keys.metric == "bi":
        raise RecipeError("score.depth.greedy has no meaning with metric bi. Use metric loss or kl, or greedy: false.")
    if keys.greedy and min([student_shape(recipe, teacher).layers, *_depths(recipe)]) == teacher.layers:
        raise RecipeError(
            "score.depth.greedy takes as many layers as prune.layers lets go, and all stay. Set prune.layers, "
            "or greedy: false."
        )


def _check_rounds(recipe: Recipe, teacher: Shape, topology: Topology) -> None:
    keys = recipe.prune
    if keys.iterations == 1:
        return
    if keys.by != "importance" or not keys.sizes():
        why = f"by: {keys.by} scores nothing" if keys.by != "importance" else "no width is cut"
        raise RecipeError(f"prune.iterations is {keys.iterations}, but {why}. Set it to 1.")
    most = max(teacher.axis_size(axis) - size for axis, size in keys.sizes().items())
    if keys.iterations > max(most, 1):
        raise RecipeError(f"prune.iterations is {keys.iterations}, and no axis loses more than {most}. Set it lower.")
    for shape in round_shapes(recipe, teacher):
        check_fits(shape, topology)
