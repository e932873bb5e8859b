"""Grid of candidate shapes, their costs, and the ones within a budget. All is counted from the layout table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

from ..errors import PlanError, RecipeError, expect_number
from ..layout import SIZED_AXES, Shape, active_parameters, flops_per_token, parameters
from ..prune import checked_sizes
from .latency import Conditions

__all__ = ["COSTS", "FILLED", "MORE_IS_BETTER", "TIMED", "Candidate", "Limit", "Space", "candidates", "costs_of"]


FILLED = "heads x head_dim"
"""Value in `Space.multiples` for `hidden`: hidden must equal heads x head_dim, which some inference clients assume."""

COSTS: Mapping[str, Callable[[Shape, Conditions], float]] = {
    "params": lambda shape, _: parameters(shape),
    "active_params": lambda shape, _: active_parameters(shape),
    "memory_bytes": lambda shape, at: at.weights(shape) + at.cache(shape),
    "flops_per_token": lambda shape, at: flops_per_token(shape, at.context),
    "decode_ms": lambda shape, at: 1000 * _seconds(shape, at),
    "tokens_per_second": lambda shape, at: at.batch / _seconds(shape, at),
}
"""Cost -> function of (shape, conditions): parameters; parameters active per token; bytes of weights and KV cache;
FLOPs of a forward pass per token, at the context; milliseconds per decoding step; tokens per second of the batch."""

MORE_IS_BETTER = ("tokens_per_second",)
TIMED = ("decode_ms", "tokens_per_second")


@dataclass(frozen=True)
class Limit:
    """A closed interval that a cost must lie in."""

    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        for name, end in (("at least", self.at_least), ("at most", self.at_most)):
            if end is not None:
                expect_number(f"the limit {name!r} of a budget", end, at_least=0)
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise RecipeError(f"a budget asks for {self}, which no value satisfies. Give [at least, at most].")

    def holds(self, value: float) -> bool:
        return not (self.at_least is not None and value < self.at_least) and not (
            self.at_most is not None and value > self.at_most
        )

    def __str__(self) -> str:
        ends = [("at least", self.at_least), ("at most", self.at_most)]
        return " and ".join(f"{word} {end:,.6g}" for word, end in ends if end is not None)


@dataclass(frozen=True)
class Space:
    """Sizes to try on each axis; an axis that is left out keeps the teacher's size."""

    sizes: Mapping[str, tuple[int, ...]]
    """Public axis or `layers` -> sizes."""
    expansions: tuple[float, ...] = ()
    """Ratios ffn / hidden, instead of sizes of `ffn`."""
    multiples: Mapping[str, int | str] = field(default_factory=dict)
    """Axis -> number that its sizes must be multiples of; `hidden` may have FILLED."""


@dataclass(frozen=True)
class Candidate:
    """A point of the grid."""

    shape: Shape
    sizes: Mapping[str, int]
    """Sizes of the axes that the grid varies or that differ from the teacher."""
    costs: Mapping[str, float]

    @property
    def name(self) -> str:
        """Name such as `layers32-hidden3072-ffn9216`, also used as a file name."""
        return "-".join(f"{axis}{size}" for axis, size in self.sizes.items())


def costs_of(shape: Shape, conditions: Conditions) -> dict[str, float]:
    """Return all costs of a shape; costs in time only if the conditions have a speed."""
    return {name: cost(shape, conditions) for name, cost in COSTS.items() if conditions.speed or name not in TIMED}


def candidates(space: Space, teacher: Shape, budget: Mapping[str, Limit], conditions: Conditions) -> list[Candidate]:
    """Return the shapes of the grid that can be cut out of the teacher and fit the budget, the largest first.

    The teacher itself is excluded. Raises RecipeError if the teacher already fits the budget, and if no candidate is
    left: the message names the rule that excludes all and the nearest value that would pass.
    """
    _check_axes(space, teacher)
    _check_budget(budget, teacher, conditions)
    points = [_Point(sizes, teacher, conditions) for sizes in _grid(space, teacher)]
    possible = [point for point in points if not point.problem]
    rules = _rules(space, budget)
    left = [point for point in possible if all(rule.holds(point) for rule in rules)]
    if not left:
        raise RecipeError(_why_empty(points, possible, rules))
    found = {point.shape: Candidate(point.shape, point.sizes, point.costs) for point in left if point.shape != teacher}
    return sorted(found.values(), key=lambda each: (-each.costs["params"], each.name))


@dataclass(frozen=True)
class _Point:
    """A point of the grid; its shape and costs are computed on first use."""

    sizes: Mapping[str, int]
    teacher: Shape
    conditions: Conditions

    @cached_property
    def problem(self) -> str:
        """Reason why the point cannot be cut out of the teacher; empty if it can."""
        try:
            checked_sizes(self.teacher, self._widths)
        except PlanError as error:
            return str(error)
        return ""

    @cached_property
    def shape(self) -> Shape:
        return self.teacher.resized(**{**self.sizes, **checked_sizes(self.teacher, self._widths)})

    @cached_property
    def costs(self) -> dict[str, float]:
        return costs_of(self.shape, self.conditions)

    @property
    def _widths(self) -> dict[str, int]:
        return {axis: size for axis, size in self.sizes.items() if axis != "layers"}


@dataclass(frozen=True)
class _Rule:
    """A condition on candidates, with advice on how to meet it."""

    name: str
    holds: Callable[[_Point], bool]
    nearest: Callable[[Sequence[_Point]], str]
    """Points that pass all other rules -> a sentence on how the nearest of them would pass this one."""


def _seconds(shape: Shape, conditions: Conditions) -> float:
    if conditions.speed is None:
        raise RecipeError("a budget in time needs the speed of the machine. Set `gpu` or `table`.")
    return conditions.speed(shape, conditions)


def _check_axes(space: Space, teacher: Shape) -> None:
    if space.expansions and "ffn" in space.sizes:
        raise RecipeError("the search has both `ffn` and `expansion`, which is ffn / hidden. Leave one out.")
    if not space.sizes and not space.expansions:
        raise RecipeError(f"the search varies no axis. Give sizes for some of {', '.join(SIZED_AXES)}.")
    for axis, sizes in space.sizes.items():
        whole = teacher.axis_size(axis)
        over = [size for size in sizes if size > whole]
        if not whole:
            raise PlanError(f"sizes of `{axis}` are given, but the model does not have this axis. Leave them out.")
        if over:
            raise PlanError(f"the search tries `{axis}` {over[0]}, but the teacher has {whole}. Use 1 to {whole}.")


def _check_budget(budget: Mapping[str, Limit], teacher: Shape, conditions: Conditions) -> None:
    for name, limit in budget.items():
        has, most = COSTS[name](teacher, conditions), name not in MORE_IS_BETTER
        end = limit.at_most if most else limit.at_least
        if end is not None and (end >= has if most else end <= has):
            raise RecipeError(
                f"the limit on `{name}` is {limit}, but the teacher has {has:,.6g}: nothing needs to be cut. "
                f"Ask for {'less' if most else 'more'}."
            )


def _grid(space: Space, teacher: Shape) -> Iterator[dict[str, int]]:
    """Yield the sizes of every combination except the teacher's."""
    axes = [axis for axis in SIZED_AXES if axis in space.sizes]
    whole = {axis: teacher.axis_size(axis) for axis in SIZED_AXES}
    for each in product(*(space.sizes[axis] for axis in axes)):
        sizes = dict(zip(axes, each, strict=True))
        hidden = sizes.get("hidden", teacher.hidden)
        for more in [{"ffn": round(ratio * hidden)} for ratio in space.expansions] or [{}]:
            both = sizes | more
            if any(size != whole[axis] for axis, size in both.items()):
                yield {axis: both[axis] for axis in SIZED_AXES if axis in both}


def _rules(space: Space, budget: Mapping[str, Limit]) -> list[_Rule]:
    rules = [_Rule(f"multiples.{axis}: {unit}", *_multiple(axis, unit)) for axis, unit in space.multiples.items()]
    return rules + [_Rule(f"budget.{name}: {limit}", *_within(name, limit)) for name, limit in budget.items()]


def _multiple(axis: str, unit: int | str) -> tuple[Callable[[_Point], bool], Callable[[Sequence[_Point]], str]]:
    if isinstance(unit, str):
        return _filled()

    def off(point: _Point) -> int:
        return min(point.shape.axis_size(axis) % unit, -point.shape.axis_size(axis) % unit)

    def nearest(points: Sequence[_Point]) -> str:
        size = min(points, key=off).shape.axis_size(axis)
        down = size // unit * unit
        return f"The nearest {axis} is {size}: {down or unit} or {down + unit} would pass."

    return lambda point: off(point) == 0, nearest


def _filled() -> tuple[Callable[[_Point], bool], Callable[[Sequence[_Point]], str]]:
    def wanted(point: _Point) -> int:
        return point.shape.heads * point.shape.head_dim

    def off(point: _Point) -> int:
        return abs(point.shape.hidden - wanted(point))

    def nearest(points: Sequence[_Point]) -> str:
        best = min(points, key=off)
        heads = f"{best.shape.heads} heads of {best.shape.head_dim}"
        return f"The nearest hidden is {best.shape.hidden}, with {heads}: {wanted(best)} would pass."

    return lambda point: off(point) == 0, nearest


def _within(name: str, limit: Limit) -> tuple[Callable[[_Point], bool], Callable[[Sequence[_Point]], str]]:
    def off(point: _Point) -> float:
        value = point.costs[name]
        return max((limit.at_least or value) - value, value - (value if limit.at_most is None else limit.at_most))

    def nearest(points: Sequence[_Point]) -> str:
        best = min(points, key=off)
        return f"The nearest has {best.costs[name]:,.6g} ({_sizes(best.shape)})."

    return lambda point: limit.holds(point.costs[name]), nearest


def _sizes(shape: Shape) -> str:
    return ", ".join(f"{axis} {shape.axis_size(axis)}" for axis in SIZED_AXES if shape.axis_size(axis))


def _why_empty(points: Sequence[_Point], possible: Sequence[_Point], rules: Sequence[_Rule]) -> str:
    """Return a message that names the rule which excludes all points.

    That is the one rule without which some points would be left; if there is none, the first rule after which none is
    left. possible: the points that can be cut out of the teacher.
    """
    what = f"none of the {len(points)} combinations of the search is left"
    if not points:
        return "the search has no combination except the teacher itself. Try other sizes."
    if not possible:
        return f"{what}: none can be cut out of the teacher. {points[0].problem}"
    for rule in rules:
        others = [point for point in possible if all(each.holds(point) for each in rules if each is not rule)]
        if others:
            return f"{what}: {rule.name} excludes all. {rule.nearest(others)}"
    left = list(possible)
    for rule in rules:
        through = [point for point in left if rule.holds(point)]
        if not through:
            return f"{what}: several rules exclude each other, {rule.name} the last ones. {rule.nearest(left)}"
        left = through
    raise AssertionError("some points pass all rules")
