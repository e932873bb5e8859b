"""The shapes that a recipe's search chooses from, counted from the teacher's alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from ..errors import RecipeError, TopologyError
from ..files import check_as, read_as
from ..layout import Shape
from ..model import check_fits
from ..parallel import Topology
from ..recipe import Count, NotNegative, Recipe
from ..records import read_shape
from ..search import TIMED, Candidate, Conditions, FittedSpeed, Roofline, SpeedRow, candidates

__all__ = ["candidates_of", "check_candidates", "conditions_of", "speed_rows", "untimed_candidates"]

BYTES = {"float32": 4, "bfloat16": 2, "float8": 1}


def candidates_of(recipe: Recipe, teacher: Shape) -> list[Candidate]:
    """The largest first. Raises RecipeError where there is none, and says why."""
    assert recipe.search is not None
    return candidates(recipe.search.space(), teacher, recipe.search.budget.limits(), conditions_of(recipe))


def untimed_candidates(recipe: Recipe, teacher: Shape) -> list[Candidate]:
    """The same whatever the budgets in time allow: to learn what time they take."""
    assert recipe.search is not None
    limits = {name: limit for name, limit in recipe.search.budget.limits().items() if name not in TIMED}
    return candidates(recipe.search.space(), teacher, limits, Conditions())


def conditions_of(recipe: Recipe) -> Conditions:
    """How the student will be served. Raises RecipeError where a table of speeds cannot be read."""
    assert recipe.search is not None
    keys = recipe.search.serving
    speed: Any = Roofline.of(keys.gpu) if keys.gpu else FittedSpeed.to(speed_rows(keys.table)) if keys.table else None
    context = keys.context or recipe.data.sequence
    return Conditions(keys.batch, context, BYTES[keys.weights], BYTES[keys.kv_cache], speed)


def speed_rows(table: Path) -> list[SpeedRow]:
    """What a `bench/table.json` says of decoding. Raises RecipeError where it says nothing of it."""
    try:
        raw = read_as(table, _Speeds)
        shapes = {name: read_shape(shape, f"{table}: {name}") for name, shape in raw["shapes"].items()}
        each = {name: raw["weight_bytes"][name] for name in shapes}
        return [_speed_row(shapes[name], each[name], rung, ms) for rung, name, ms in _times(raw, shapes, table)]
    except (KeyError, ValueError) as error:
        cause = str(error).rstrip(".")
        raise RecipeError(
            f"search.serving.table {table} is no table of speeds ({cause}). Make one: `minitron bench --backend torch`."
        ) from error


def _times(raw: _Speeds, names: Iterable[str], table: Path) -> Iterator[tuple[_Rung, str, float]]:
    """(rung, model, milliseconds a token) of what was measured of decoding."""
    for row in raw["rows"]:
        rung = check_as(row, _Rung, f"{table}: rows")
        for name in names:
            if ms := check_as(row.get(name) or {}, _Speed, f"{table}: {name}").get("token_ms"):
                yield rung, name, ms


def _speed_row(shape: Shape, each: int, rung: _Rung, ms: float) -> SpeedRow:
    return SpeedRow(shape, Conditions(rung["batch"], rung["inputs"] + rung["outputs"], each, each), ms / 1000)


class _Speeds(TypedDict):
    """A `bench/table.json`."""

    shapes: dict[str, dict[str, Any]]
    weight_bytes: dict[str, Count]
    rows: list[dict[str, Any]]


class _Rung(TypedDict):
    batch: Count
    inputs: Count
    outputs: Count


class _Speed(TypedDict, total=False):
    token_ms: NotNegative | None


def check_candidates(recipe: Recipe, teacher: Shape, topology: Topology) -> None:
    """Raises RecipeError for an empty grid, and TopologyError where the layout cannot hold a candidate."""
    for each in candidates_of(recipe, teacher):
        try:
            check_fits(each.shape, topology)
        except TopologyError as error:
            raise TopologyError(f"candidate {each.name}: {error}") from error
