"""The shapes that a recipe's search chooses from, counted from the teacher's alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import RecipeError, TopologyError
from ..files import read_json
from ..layout import Shape
from ..model import check_fits
from ..parallel import Topology
from ..search import TIMED, Candidate, Conditions, FittedSpeed, Roofline, SpeedRow, candidates
from .schema import Recipe

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
        raw = read_json(table)
        shapes = {name: Shape(**shape) for name, shape in raw["shapes"].items()}
        each = raw["weight_bytes"]
        return [
            SpeedRow(
                shapes[name],
                Conditions(row["batch"], row["inputs"] + row["outputs"], each[name], each[name]),
                row[name]["token_ms"] / 1000,
            )
            for row in raw["rows"]
            for name in shapes
            if (row.get(name) or {}).get("token_ms")
        ]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise RecipeError(
            f"search.serving.table {table} is no table of speeds ({error}). Make one: `minitron bench --backend torch`."
        ) from error


def check_candidates(recipe: Recipe, teacher: Shape, topology: Topology) -> None:
    """Raises RecipeError for an empty grid, and TopologyError where the layout cannot hold a candidate."""
    for each in candidates_of(recipe, teacher):
        try:
            check_fits(each.shape, topology)
        except TopologyError as error:
            raise TopologyError(f"candidate {each.name}: {error}") from error
