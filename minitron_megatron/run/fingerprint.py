"""Fingerprint of a stage: a hash of all that its result depends on (recipe keys, files, results of earlier stages)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from ..convert import carried_files, read_config
from ..data import corpus_marks, places, settings_without_chat
from ..files import checksum, file_marks
from ..recipe import Recipe
from .stage import Result, Stage

__all__ = ["carried_marks", "config_digest", "digest", "fingerprint", "task_marks", "untimed"]

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")


def fingerprint(stage: Stage, recipe: Recipe, done: Mapping[str, Result]) -> str:
    """Return the fingerprint of a stage: recipe keys that it reads, files behind them and results that it uses."""
    keys = recipe.deciding()
    read = ["plugins", *stage.reads] if recipe.plugins else stage.reads
    return digest(
        {
            "stage": stage.name,
            "keys": {name: keys[name] for name in read},
            "asks": stage.extra_inputs(recipe),  # the key enters the hash: another name would rerun finished stages
            "files": _input_marks(recipe) if "data" in stage.reads else [],
            "results": untimed({name: result for name, result in done.items() if stage.uses(name)}),
        }
    )


def digest(value: object) -> str:
    """Return the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def untimed(done: Mapping[str, Result]) -> dict[str, Result]:
    """Return the stages' results without their durations."""
    return {name: {k: v for k, v in result.items() if k != "seconds"} for name, result in done.items()}


def config_digest(folder: Path) -> str:
    """Return a hash of a model's config as parsed here: shape and constants, all that it computes with but weights."""
    config = asdict(read_config(folder))
    return digest({name: value for name, value in config.items() if name != "source"})


def carried_marks(folder: Path) -> dict[str, str]:
    """Return checksums of the files copied along with new weights: tokenizer, chat templates, generation settings."""
    return {str(path.relative_to(folder)): checksum(path) for path in carried_files(folder)}


def task_marks(recipe: Recipe) -> list[object]:
    """Return marks of the files that tasks read: the teacher's tokenizer and generation settings, its chat template
    only if prompts go through it, and the questions."""
    files, marks = recipe.evaluate.task_files, carried_marks(recipe.model)
    if not recipe.evaluate.uses_template:
        marks = {name: mark for name, mark in marks.items() if "chat_template" not in name}
        marks["tokenizer_config.json"] = digest(settings_without_chat(recipe.model))
    return [marks, file_marks([files] if files else [])]


def _input_marks(recipe: Recipe) -> list[object]:
    """Return marks of the teacher's weights, config and tokenization, and of every source. Other files of the teacher's
    folder do not count: a chat template does not affect the tokens of a corpus."""
    paths = [path for pattern in WEIGHTS for path in sorted(recipe.model.glob(pattern))]
    paths += [path for source in recipe.data.sources for path in places(source.paths)]
    paths += [path for source in recipe.data.sources for path in places(source.held_out_paths)]
    return [file_marks(paths), config_digest(recipe.model), corpus_marks(recipe.model)]
