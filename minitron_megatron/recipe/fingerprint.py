"""What something depends on, as one number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import file_marks
from .schema import Recipe
from .stage import Stage

__all__ = ["digest", "fingerprint", "untimed"]


def fingerprint(stage: Stage, recipe: Recipe, done: Mapping[str, Mapping[str, Any]]) -> str:
    """Of a stage's output: the recipe keys that it reads, the files behind them and the results that it uses."""
    keys = recipe.model_dump(mode="json")
    return digest(
        {
            "stage": stage.name,
            "keys": {name: keys[name] for name in stage.reads},
            "asks": stage.asks(recipe),
            "files": [_file_marks(recipe)] if "data" in stage.reads else [],
            "results": untimed({name: done[name] for name in stage.after if name in done}),
        }
    )


def digest(told: Any) -> str:
    """SHA-256 of what is JSON."""
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def untimed(done: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The results of stages without how long they took."""
    return {name: {k: v for k, v in result.items() if k != "seconds"} for name, result in done.items()}


def _file_marks(recipe: Recipe) -> list[Any]:
    """Of every source and weights file."""
    paths = [recipe.model, *(source.path for source in recipe.data.sources)]
    paths += [source.validation for source in recipe.data.sources if isinstance(source.validation, Path)]
    return file_marks(paths)
