"""Splits of a task: the scored one, and the one that few-shot examples come from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .. import numbers
from ..errors import DataError, RecipeError
from .local import LocalData, Row, read_rows, split_files
from .registry import HarnessConfig

if TYPE_CHECKING:
    from lm_eval.api.task import Task as HarnessTask

__all__ = ["SPLITS", "check_rows", "check_shots", "check_texts", "with_files"]

SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
"""Keys by which a task's configuration names its data."""
LOOKED_AT = 100
"""Number of questions with missing fields that are checked before a task runs."""


def check_shots(task: str, config: HarnessConfig) -> None:
    """Raise RecipeError if examples would come from the scored split, or if there are too few."""
    _splits(task, config)


def _splits(task: str, config: HarnessConfig) -> tuple[str, str | None]:
    """Return (scored split, split of the examples or None). Raises RecipeError as `check_shots`.

    The rules are the harness's: `fewshot_split`, else listed examples, else training, validation, test. Only if a task
    names its test split as the split of examples does the harness leave a question out of its own examples.
    """
    scored = config.get("test_split") or config.get("validation_split")
    if not scored:
        raise RecipeError(f"task {task} names no split to score. Leave it out.")
    wanted, how = config.get("num_fewshot") or 0, config.get("fewshot_config") or {}
    named = _named(config)
    if not wanted:
        return scored, None
    if named is None and how.get("samples") is not None:
        listed = how["samples"]
        if isinstance(listed, Sequence) and len(listed) < wanted:
            there = numbers.counted(len(listed), "example")
            raise RecipeError(f"task {task} has {there}, fewer than its shots ({wanted}). Use fewer shots.")
        return scored, None
    source = named or next(config[key] for key in SPLITS[:3] if config.get(key))
    if source == scored and (named is None or named != config.get("test_split")):
        raise RecipeError(
            f"task {task} has no examples besides the scored questions, so examples would show the answers. "
            "Set its shots to 0."
        )
    return scored, source


def _named(config: HarnessConfig) -> str | None:
    how = config.get("fewshot_config") or {}
    return how.get("split", config.get("fewshot_split"))


def with_files(task: str, config: HarnessConfig, files: Path) -> HarnessConfig:
    """Return the configuration with local files instead of downloads. Raises DataError if a file is missing."""
    scored, source = _splits(task, config)
    found = split_files(task, files)
    for split, use in ((scored, "is scored on this split"), (source, "takes its examples from this split")):
        if split is not None and split not in found:
            raise DataError(
                f"{files / task / split}.jsonl is missing: task {task} {use}. "
                f"Add it{', or set shots to 0' if split == source else ''}; the folder has {', '.join(found)}."
            )
    wanted = {split: str(found[split]) for split in (scored, source) if split is not None}
    gone: dict[str, object] = {key: None for key in SPLITS if config.get(key) not in wanted}
    if (config.get("fewshot_config") or {}).get("split") not in {None, *wanted}:
        gone["fewshot_config"] = {key: value for key, value in config["fewshot_config"].items() if key != "split"}
    data = {"custom_dataset": LocalData(wanted), "dataset_path": "json", "dataset_name": None, "dataset_kwargs": None}
    return {**config, **gone, **data}


def check_rows(task: str, config: HarnessConfig, files: Path) -> None:
    """Raise DataError if local files hold too few examples, or all scored questions among the examples."""
    scored, source = _splits(task, config)
    found = split_files(task, files)
    questions = read_rows(found[scored])
    if source is None:
        return
    examples = read_rows(found[source])
    spare = int(_named(config) == config.get("test_split"))  # the harness draws one more there
    if config.get("process_docs") is None and len(examples) < (wanted := config["num_fewshot"] + spare):
        raise DataError(
            f"{found[source]} holds {numbers.counted(len(examples), 'example')}, but task {task} needs {wanted} with "
            f"{numbers.counted(config['num_fewshot'], 'shot')}. Add more, or use fewer shots."
        )
    if source != scored and _texts(questions) <= _texts(examples):
        raise DataError(
            f"{found[source]} holds all scored questions of {found[scored].name}, so examples would show the answers. "
            "Give the task's own examples, or set its shots to 0."
        )


def _texts(rows: Sequence[Row]) -> set[str]:
    return {json.dumps(row, sort_keys=True) for row in rows}


def check_texts(task: str, built: HarnessTask, data: LocalData) -> None:
    """Raise DataError if a field that a prompt or an answer needs is missing or null in a question.

    built: the harness's task. Only questions that lack a field of the file's first question are checked.
    """
    if built.config.process_docs is not None:
        return
    for file in data.files.values():
        rows = read_rows(Path(file))
        needed = {name for name, value in rows[0].items() if value is not None}
        lacking = [(at, row) for at, row in enumerate(rows, 1) if any(row.get(name) is None for name in needed)]
        names = {name for row in rows for name in row}
        for at, row in lacking[:LOOKED_AT]:
            missing = sorted(name for name in needed if row.get(name) is None)
            if _lacks(built, {**dict.fromkeys(names), **row}):
                raise DataError(
                    f"{file}, question {at}: {', '.join(missing)} is missing or null, but task {task} needs it. "
                    "Correct or leave out this question."
                )


def _lacks(built: HarnessTask, row: Row) -> bool:
    """Return whether a question's texts cannot be built, or contain "None" although no field does."""
    try:
        texts = [built.doc_to_text(row), built.doc_to_target(row)]
        texts += [built.doc_to_choice(row)] if built.config.doc_to_choice is not None else []
    except Exception:  # templates and functions of tasks raise anything
        return True
    return "None" in str(texts) and "None" not in str([value for value in row.values() if value is not None])
