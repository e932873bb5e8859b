"""All that a result depends on, as one number: recipe keys, files, and the results of earlier stages."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..convert import carried_files, read_config
from ..data import corpus_marks, settings_without_chat
from ..files import checksum, file_marks
from ..recipe import Recipe
from .stage import Stage

__all__ = ["carried_marks", "config_digest", "digest", "fingerprint", "task_marks", "untimed"]

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def fingerprint(stage: Stage, recipe: Recipe, done: Mapping[str, Mapping[str, Any]]) -> str:
    """Of a stage's output: the recipe keys that it reads, the files behind them and the results that it uses."""
    keys = recipe.deciding()
    return digest(
        {
            "stage": stage.name,
            "keys": {name: keys[name] for name in stage.reads},
            "asks": stage.asks(recipe),
            "files": _input_marks(recipe) if "data" in stage.reads else [],
            "results": untimed({name: done[name] for name in stage.after if name in done}),
        }
    )


def digest(told: Any) -> str:
    """SHA-256 of what is JSON."""
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def untimed(done: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The results of stages without how long they took."""
    return {name: {k: v for k, v in result.items() if k != "seconds"} for name, result in done.items()}


def config_digest(folder: Path) -> str:
    """A number for what a model computes besides its weights: its shape and constants, as they are understood here."""
    config = asdict(read_config(folder))
    return digest({name: value for name, value in config.items() if name != "source"})


def carried_marks(folder: Path) -> dict[str, str]:
    """The contents of the files that go along with new weights: tokenizer, chat templates, generation settings."""
    return {str(path.relative_to(folder)): checksum(path) for path in carried_files(folder)}


def task_marks(recipe: Recipe) -> list[Any]:
    """The files that tasks read: the teacher's tokenizer and settings of generation, its chat template only where
    prompts are put into it, and the questions."""
    files, marks = recipe.evaluate.task_files, carried_marks(recipe.model)
    if not recipe.evaluate.chat:
        marks = {name: mark for name, mark in marks.items() if "chat_template" not in name}
        marks["tokenizer_config.json"] = digest(settings_without_chat(recipe.model))
    return [marks, file_marks([files] if files else [])]


def _input_marks(recipe: Recipe) -> list[Any]:
    """The teacher's weights and configuration, what its tokenizer makes of text, and every source. Nothing else of the
    teacher's folder: a chat template decides no token of a corpus."""
    paths = [path for pattern in WEIGHTS for path in sorted(recipe.model.glob(pattern))]
    paths += [source.path for source in recipe.data.sources]
    paths += [source.validation for source in recipe.data.sources if isinstance(source.validation, Path)]
    return [file_marks(paths), config_digest(recipe.model), corpus_marks(recipe.model)]
