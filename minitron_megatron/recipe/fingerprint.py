"""What a stage's output depends on, as one number."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import file_marks
from .schema import Recipe
from .stages import Stage

__all__ = ["fingerprint"]


def fingerprint(stage: Stage, recipe: Recipe, done: Mapping[str, Mapping[str, Any]]) -> str:
    """SHA-256 over the recipe keys that a stage reads, the files behind them and the results that it uses."""
    keys = recipe.model_dump(mode="json")
    read = {
        "stage": stage.name,
        "keys": {name: keys[name] for name in stage.reads},
        "asks": stage.asks(recipe),
        "files": [_file_marks(recipe)] if "data" in stage.reads else [],
        "results": {
            name: {k: v for k, v in done[name].items() if k != "seconds"}
            for name in stage.after
            if name in done and name != "search"  # whose result are keys of the recipe
        },
    }
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


def _file_marks(recipe: Recipe) -> list[Any]:
    """Of every source and weights file."""
    paths = [recipe.model, *(source.path for source in recipe.data.sources)]
    paths += [source.validation for source in recipe.data.sources if isinstance(source.validation, Path)]
    return file_marks(paths)
