"""Sizes and measurements that a recipe's `score` and `prune` keys imply for a teacher, from its shape alone."""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd

from ..convert import read_config
from ..errors import PlanError, RecipeError, TopologyError
from ..layout import Shape
from ..model import check_fits
from ..parallel import Topology
from ..prune import check_merge, checked_sizes
from ..recipe import Depth, Recipe
from ..records import Plan
from ..score import DEPTH_METRICS, check_statistic
from ..search import Candidate
from .candidates import candidates_of

__all__ = ["DepthSweep", "Sizes", "check_pruning", "depth_sweep", "rounds", "sizes_of", "student_shape"]

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


@dataclass(frozen=True)
class Sizes:
    """Shapes and measurements that a recipe implies for a teacher."""

    teacher: Shape
    student: Shape
    """Before a search has ended, the shape of its largest candidate."""
    candidates: tuple[Candidate, ...]
    """Candidates of a search within its budget, the largest first."""
    rounds: tuple[Shape, ...]
    """The model's shape after each of `prune.iterations` rounds."""
    sweep: DepthSweep | None
    """Measurement of layers; None: they are not measured."""


def sizes_of(recipe: Recipe, teacher: Shape) -> Sizes:
    """Return all that a recipe implies for a teacher. Raises PlanError or RecipeError for impossible sizes."""
    found = tuple(candidates_of(recipe, teacher)) if recipe.search else ()
    student = found[0].shape if found else student_shape(recipe, teacher)
    after = [teacher.resized(layers=student.layers, **checked_sizes(teacher, each)) for each in rounds(recipe, teacher)]
    return Sizes(teacher, student, found, tuple(after), depth_sweep(recipe, teacher))


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


def _unit(axis: str, teacher: Shape, size: int, count: int) -> int:
    """Return the unit of intermediate sizes. It does not depend on the layout."""
    if axis == "heads" and not teacher.multi_head:
        return teacher.kv_groups
    unit = gcd(teacher.axis_size(axis), size, ROUND_MULTIPLE)
    while unit > 1 and unit * count > teacher.axis_size(axis) - size:
        unit //= 2
    return unit


def depth_sweep(recipe: Recipe, teacher: Shape) -> DepthSweep | None:
    """Return the settings of the measurement of layers; None: they are not measured."""
    if not recipe.measures_layers:
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


def check_pruning(recipe: Recipe, teacher: Shape, topology: Topology) -> Sizes:
    """Return what the recipe implies for the teacher. Not collective.

    Raises RecipeError, PlanError or TopologyError if the teacher cannot be scored, pruned or distilled as it says.
    """
    sizes = sizes_of(recipe, teacher)
    for each in sizes.candidates:
        try:
            check_fits(each.shape, topology)
        except TopologyError as error:
            raise TopologyError(f"candidate {each.name}: {error}") from error
    check_fits(sizes.student, topology)
    if recipe.needs_scores:
        check_statistic(recipe.score.statistic, teacher)
    if recipe.prune.merge != "none" and recipe.prune.by != "importance":
        raise RecipeError(f"prune.merge needs scores, but prune.by: {recipe.prune.by} has none. Set merge to none.")
    if recipe.prune.merge != "none":
        check_merge(teacher, sizes.student, recipe.prune.merge)
    _check_depth(recipe, sizes)
    _check_rounds(recipe, sizes, topology)
    if recipe.distill.states:
        recipe.distill.states.check(teacher, sizes.student, topology)
    return sizes


def _check_depth(recipe: Recipe, sizes: Sizes) -> None:
    keys, teacher = recipe.score.depth, sizes.teacher
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
    if keys.greedy and min([sizes.student.layers, *_depths(recipe)]) == teacher.layers:
        raise RecipeError(
            "score.depth.greedy removes as many layers as prune.layers does, but prune.layers keeps all. "
            "Set prune.layers, or greedy: false."
        )


def _check_rounds(recipe: Recipe, sizes: Sizes, topology: Topology) -> None:
    keys = recipe.prune
    if keys.iterations == 1:
        return
    if keys.by != "importance" or not keys.sizes():
        why = f"prune.by: {keys.by} needs no scores" if keys.by != "importance" else "no width is pruned"
        raise RecipeError(f"prune.iterations is {keys.iterations}, but {why}. Set it to 1.")
    most = max(sizes.teacher.axis_size(axis) - size for axis, size in keys.sizes().items())
    if keys.iterations > max(most, 1):
        raise RecipeError(f"prune.iterations is {keys.iterations}, but no axis loses more than {most}. Lower it.")
    for shape in sizes.rounds:
        check_fits(shape, topology)
