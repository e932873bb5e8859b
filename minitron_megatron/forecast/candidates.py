"""Candidate shapes of a recipe's search, counted from the teacher's shape alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from typing_extensions import TypedDict

from ..errors import RecipeError
from ..files import check_as, read_as
from ..layout import Shape
from ..recipe import Recipe, with_keys_in_errors
from ..records import read_shape
from ..search import TIMED, Candidate, Conditions, FittedSpeed, Roofline, SpeedRow, candidates
from ..settings import Count, NotNegative
from .memory import WEIGHT_BYTES

__all__ = ["candidates_of", "conditions_of", "speed_rows", "untimed_candidates"]


@with_keys_in_errors("search")
def candidates_of(recipe: Recipe, teacher: Shape) -> list[Candidate]:
    """Return the candidates within the budget, the largest first. Raises RecipeError with the reason if none is."""
    assert recipe.search is not None
    return candidates(recipe.search.space(), teacher, recipe.search.budget.limits(), conditions_of(recipe))


@with_keys_in_errors("search")
def untimed_candidates(recipe: Recipe, teacher: Shape) -> list[Candidate]:
    """Return the candidates without the budgets on time, so that their times can be measured."""
    assert recipe.search is not None
    limits = {name: limit for name, limit in recipe.search.budget.limits().items() if name not in TIMED}
    return candidates(recipe.search.space(), teacher, limits, Conditions())


def conditions_of(recipe: Recipe) -> Conditions:
    """Return the student's serving conditions. Raises RecipeError if the table of speeds cannot be read."""
    assert recipe.search is not None
    keys = recipe.search.serving
    return Conditions(
        keys.batch,
        keys.context or recipe.data.sequence,
        WEIGHT_BYTES[keys.weights],
        WEIGHT_BYTES[keys.kv_cache],
        Roofline.of(keys.gpu) if keys.gpu else _fitted(keys.table) if keys.table else None,
    )


def _fitted(table: Path) -> FittedSpeed:
    rows = speed_rows(table)
    try:
        return FittedSpeed.to(rows)
    except RecipeError as error:
        raise _no_table(table, error) from error


def speed_rows(table: Path) -> list[SpeedRow]:
    """Read the decoding speeds in a `bench/table.json`. Raises RecipeError if it has none."""
    try:
        raw = read_as(table, _Speeds)
        shapes = {name: read_shape(shape, f"{table}: {name}") for name, shape in raw["shapes"].items()}
        weight_bytes = {name: raw["weight_bytes"][name] for name in shapes}
        times = _times(raw, shapes, table)
        return [_speed_row(shapes[name], weight_bytes[name], workload, ms) for workload, name, ms in times]
    except (KeyError, ValueError) as error:
        raise _no_table(table, error) from error


def _no_table(table: Path, error: Exception) -> RecipeError:
    cause = str(error).rstrip(".")
    return RecipeError(
        f"search.serving.table {table} is not a table of speeds ({cause}). Make one with "
        "`minitron bench --backend torch`."
    )


def _times(raw: _Speeds, names: Iterable[str], table: Path) -> Iterator[tuple[_Workload, str, float]]:
    """Yield (workload, model, milliseconds per token) of each decoding measurement."""
    for row in raw["rows"]:
        workload = check_as(row, _Workload, f"{table}: rows")
        for name in names:
            if ms := check_as(row.get(name) or {}, _Speed, f"{table}: {name}").get("token_ms"):
                yield workload, name, ms


def _speed_row(shape: Shape, weight_bytes: int, workload: _Workload, ms: float) -> SpeedRow:
    context = workload["inputs"] + workload["outputs"]
    return SpeedRow(shape, Conditions(workload["batch"], context, weight_bytes, weight_bytes), ms / 1000)


class _Speeds(TypedDict):
    """Contents of a `bench/table.json`."""

    shapes: dict[str, dict[str, object]]
    weight_bytes: dict[str, Count]
    rows: list[dict[str, object]]


class _Workload(TypedDict):
    batch: Count
    inputs: Count
    outputs: Count


class _Speed(TypedDict, total=False):
    token_ms: NotNegative | None
