"""A grid of shapes, what each would cost, and those that a budget leaves. Counted from the layout table: no model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

from ..errors import PlanError, RecipeError, expect_number
from ..layout import PUBLIC_AXES, Shape, active_parameters, flops_per_token, parameters
from ..prune import checked_sizes
from .latency import Conditions

__all__ = ["COSTS", "FILLED", "MORE_IS_BETTER", "TIMED", "Candidate", "Limit", "Space", "candidates", "costs_of"]

AXES = ("layers", *PUBLIC_AXES)

FILLED = "heads x head_dim"
"""In the place of a multiple of `hidden`: hidden must be equal to this, for some clients take it to be so."""

COSTS: Mapping[str, Callable[[Shape, Conditions], float]] = {
    "params": lambda shape, _: parameters(shape),
    "active_params": lambda shape, _: active_parameters(shape),
    "memory_bytes": lambda shape, at: at.weights(shape) + at.cache(shape),
    "flops_per_token": lambda shape, at: flops_per_token(shape, at.context),
    "decode_ms": lambda shape, at: 1000 * _seconds(shape, at),
    "tokens_per_second": lambda shape, at: at.batch / _seconds(shape, at),
}
"""Budget -> what a shape has of it: parameters; those that a token goes through; bytes of weights and key-value cache;
FLOPs of a forward pass a token, at the context; milliseconds a decoding step; tokens a second of the whole batch."""

MORE_IS_BETTER = ("tokens_per_second",)
TIMED = ("decode_ms", "tokens_per_second")


@dataclass(frozen=True)
class Limit:
    """A window, both ends in it."""

    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        for name, end in (("at least", self.at_least), ("at most", self.at_most)):
            if end is not None:
                expect_number(f"the end {name!r} of a budget", end, at_least=0)
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise RecipeError(f"a budget asks for {self}: nothing is both. Give [at least, at most].")

    def holds(self, value: float) -> bool:
        return not (self.at_least is not None and value < self.at_least) and not (
            self.at_most is not None and value > self.at_most
        )

    def __str__(self) -> str:
        ends = [("at least", self.at_least), ("at most", self.at_most)]
        return " and ".join(f"{word} {end:,.6g}" for word, end in ends if end is not None)


@dataclass(frozen=True)
class Space:
    """The sizes to try on each axis; an axis left out stays as the teacher has it."""

    sizes: Mapping[str, tuple[int, ...]]
    """Public axis, or `layers` -> sizes."""
    expansions: tuple[float, ...] = ()
    """In the place of `ffn`: neurons over hidden channels."""
    multiples: Mapping[str, int | str] = field(default_factory=dict)
    """Axis -> what its sizes must be multiples of; `hidden` may be held to FILLED."""


@dataclass(frozen=True)
class Candidate:
    """A point of the grid."""

    shape: Shape
    sizes: Mapping[str, int]
    """Of the axes that the grid varies, or that differ from the teacher."""
    costs: Mapping[str, float]

    @property
    def name(self) -> str:
        """`layers32-hidden3072-ffn9216`: a file name as well."""
        return "-".join(f"{axis}{size}" for axis, size in self.sizes.items())


def costs_of(shape: Shape, conditions: Conditions) -> dict[str, float]:
    """Every cost that can be told: those in time need a speed."""
    return {name: cost(shape, conditions) for name, cost in COSTS.items() if conditions.speed or name not in TIMED}


def candidates(space: Space, teacher: Shape, budget: Mapping[str, Limit], conditions: Conditions) -> list[Candidate]:
    """The shapes of the grid that can be cut out of the teacher and that the budget allows, the largest first.

    The teacher itself is none. Raises RecipeError where the budget would let the teacher through, and where nothing is
    left, with the rule that empties the grid and the nearest value that would not.
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
    """A point of the grid, counted when it is asked."""

    sizes: Mapping[str, int]
    teacher: Shape
    conditions: Conditions

    @cached_property
    def problem(self) -> str:
        """Why it cannot be cut out of the teacher; empty where it can."""
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
    """Something that a candidate must hold, and how a user could have it hold."""

    name: str
    holds: Callable[[_Point], bool]
    nearest: Callable[[Sequence[_Point]], str]
    """Of points that hold everything else: a sentence on what would let the nearest of them through."""


def _seconds(shape: Shape, conditions: Conditions) -> float:
    if conditions.speed is None:
        raise RecipeError("a budget in time needs to know how fast. Set search.serving.gpu, or .table.")
    return conditions.speed(shape, conditions)


def _check_axes(space: Space, teacher: Shape) -> None:
    if space.expansions and "ffn" in space.sizes:
        raise RecipeError("search has both ffn and expansion, which is ffn over hidden. Leave one out.")
    if not space.sizes and not space.expansions:
        raise RecipeError(f"search varies no axis. Give sizes for some of {', '.join(AXES)}.")
    for axis, sizes in space.sizes.items():
        whole = teacher.axis_size(axis)
        over = [size for size in sizes if size > whole]
        if not whole:
            raise PlanError(f"search.{axis} is given, and the model has none. Leave it out.")
        if over:
            raise PlanError(f"search.{axis} tries {over[0]} of {whole}. Ask for 1 to {whole}.")


def _check_budget(budget: Mapping[str, Limit], teacher: Shape, conditions: Conditions) -> None:
    for name, limit in budget.items():
        has, most = COSTS[name](teacher, conditions), name not in MORE_IS_BETTER
        end = limit.at_most if most else limit.at_least
        if end is not None and (end >= has if most else end <= has):
            raise RecipeError(
                f"search.budget.{name} asks for {limit}, and the teacher has {has:,.6g}: nothing would need to go. "
                f"Ask for {'less' if most else 'more'}."
            )


def _grid(space: Space, teacher: Shape) -> Iterator[dict[str, int]]:
    """The sizes of every combination but that of the teacher."""
    axes = [axis for axis in AXES if axis in space.sizes]
    whole = {axis: teacher.axis_size(axis) for axis in AXES}
    for each in product(*(space.sizes[axis] for axis in axes)):
        sizes = dict(zip(axes, each, strict=True))
        hidden = sizes.get("hidden", teacher.hidden)
        for more in [{"ffn": round(ratio * hidden)} for ratio in space.expansions] or [{}]:
            both = sizes | more
            if any(size != whole[axis] for axis, size in both.items()):
                yield {axis: both[axis] for axis in AXES if axis in both}


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
        return f"The nearest {axis} is {size}: {down or unit} or {down + unit} would do."

    return lambda point: off(point) == 0, nearest


def _filled() -> tuple[Callable[[_Point], bool], Callable[[Sequence[_Point]], str]]:
    def wanted(point: _Point) -> int:
        return point.shape.heads * point.shape.head_dim

    def off(point: _Point) -> int:
        return abs(point.shape.hidden - wanted(point))

    def nearest(points: Sequence[_Point]) -> str:
        best = min(points, key=off)
        heads = f"{best.shape.heads} heads of {best.shape.head_dim}"
        return f"The nearest hidden is {best.shape.hidden}, with {heads}: {wanted(best)} would do."

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
    return ", ".join(f"{axis} {shape.axis_size(axis)}" for axis in AXES if shape.axis_size(axis))


def _why_empty(points: Sequence[_Point], possible: Sequence[_Point], rules: Sequence[_Rule]) -> str:
    """Which rule empties the grid: the one without which something were left, or else the first that leaves nothing.

    possible: those of the points that can be cut out of the teacher.
    """
    what = f"none of the {len(points)} combinations of search is left"
    if not points:
        return "search has no combination but the teacher itself. Try other sizes."
    if not possible:
        return f"{what}: none can be cut out of the teacher. {points[0].problem}"
    for rule in rules:
        others = [point for point in possible if all(each.holds(point) for each in rules if each is not rule)]
        if others:
            return f"{what}: {rule.name} lets none through. {rule.nearest(others)}"
    left = list(possible)
    for rule in rules:
        through = [point for point in left if rule.holds(point)]
        if not through:
            return f"{what}, for several rules exclude each other: {rule.name} takes the last. {rule.nearest(left)}"
        left = through
    raise AssertionError("something is left")
