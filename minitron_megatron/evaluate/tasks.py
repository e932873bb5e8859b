"""Tasks of lm-evaluation-harness: the papers' suites, local files for downloads, results in its own form."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

from ..errors import DataError, RecipeError, did_you_mean
from ..events import Listener, silent
from ..parallel import Topology, broadcast_object
from .harness import harness_model
from .predict import Predictor, Run

__all__ = ["SUITES", "Task", "check_tasks", "run_tasks", "scores_of"]


@dataclass(frozen=True)
class Task:
    """One task of the harness."""

    name: str
    shots: int | None = None
    """Solved examples before each question; None: as the task has it."""
    metric: str | None = None
    """The one that stands in tables; None: the task's first."""


SUITES: Mapping[str, tuple[Task, ...]] = {
    "base": (
        Task("mmlu", 5, "acc"),
        Task("winogrande", 5, "acc"),
        Task("arc_challenge", 25, "acc_norm"),
        Task("hellaswag", 10, "acc_norm"),
        Task("gsm8k", 5, "exact_match"),
        Task("truthfulqa_mc2", 0, "acc"),
    ),
    "instruct": (
        Task("mmlu", 5, "acc"),
        Task("gsm8k", 0, "exact_match"),
        Task("gpqa_main_zeroshot", 0, "acc_norm"),
        Task("ifeval", 0, "prompt_level_strict_acc"),
    ),
}
"""Shots and metrics as in both papers. What they also report runs model-written code (HumanEval, MBPP), judges by
another model (MT-Bench), needs a service (BFCL) or a fifth of a corpus (XL-Sum): not here."""

SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
"""What a task's configuration calls its data."""


def check_tasks(tasks: Sequence[Task], files: Path | None) -> None:
    """Raises RecipeError for a task that the harness does not know, DataError for one without its files."""
    for task in tasks:
        for leaf in _leaves(task.name):
            if files is not None:
                _local(leaf, files)


def run_tasks(
    model: Any,
    tasks: Sequence[Task],
    tokenizer: Any,
    topology: Topology,
    *,
    files: Path | None = None,
    limit: int | None = None,
    truncate: bool = False,
    micro_batch: int = 8,
    run: Run | None = None,
    listener: Listener = silent,
) -> dict[str, Any]:
    """Runs tasks and returns the harness's own results, samples included, on every rank. Collective over the world.

    files: `FOLDER/<task>/<split>.jsonl` with the fields that the harness's own data have, in the place of downloads.
    limit: questions a task. truncate: drop the beginnings of prompts longer than the context. run: in the place of the
    model's forward pass.
    """
    from lm_eval import simple_evaluate

    predictor = Predictor(model, topology, micro_batch=micro_batch, run=run)
    lm = harness_model(predictor, tokenizer, truncate=truncate, listener=listener)
    with _quiet():
        found = simple_evaluate(
            model=lm,
            tasks=[_configured(task, leaf, files) for task in tasks for leaf in _leaves(task.name)],
            task_manager=_manager(),
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
        )
    # the harness answers the first rank of a machine alone
    return broadcast_object(json.loads(json.dumps(found, default=str)) if topology.rank == 0 else None)


def scores_of(results: Mapping[str, Any], tasks: Sequence[Task]) -> dict[str, float]:
    """Task -> the number that stands in tables; of a group the mean over all its questions."""
    scores = {}
    for task in tasks:
        leaves = _leaves(task.name)
        counts = [results["n-samples"][leaf]["effective"] for leaf in leaves]
        values = [_metric(results["results"][leaf], task.metric) for leaf in leaves]
        scores[task.name] = sum(v * n for v, n in zip(values, counts, strict=True)) / sum(counts)
    return scores


def _metric(found: Mapping[str, Any], name: str | None) -> float:
    """The harness writes `metric,filter`; the metric's first filter, or the first metric of all."""
    plain = {key: value for key, value in found.items() if "," in key and "_stderr," not in key}
    named = [value for key, value in plain.items() if key.split(",")[0] == name]
    return float((named or list(plain.values()))[0])


@cache
def _manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _leaves(name: str) -> list[str]:
    """A task, or all of a group's or a tag's. Raises RecipeError where there is none of the name."""
    index = _manager().task_index
    if name not in index:
        raise RecipeError(f"there is no task {name}.{did_you_mean(name, index)}")
    kind = index[name].kind.name
    if kind == "TAG":
        return [leaf for leaf, entry in index.items() if name in entry.tags]
    if kind != "GROUP":
        return [name]
    parts = [each if isinstance(each, str) else each.get("task", each.get("group")) for each in index[name].cfg["task"]]
    return [leaf for part in parts for leaf in _leaves(part)]


def _configured(task: Task, name: str, files: Path | None) -> Any:
    """The harness's own configuration of a task, with our shots and data."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(_manager().task_index[name].yaml_path, resolve_func=True)
    config.pop("tag", None)
    if files is not None:
        splits = _local(name, files)
        config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": splits}}
        config |= {key: None for key in SPLITS if config.get(key) not in splits}
    if task.shots is not None:
        config["num_fewshot"] = task.shots
    return config


def _local(name: str, files: Path) -> dict[str, str]:
    """Split -> file. Raises DataError where there is none."""
    folder = files / name
    found = {path.stem: str(path) for path in sorted(folder.glob("*.jsonl"))}
    if not found:
        raise DataError(f"{folder} has no .jsonl file: one is to be there for each split, such as test.jsonl.")
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness without its log and its bars."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        log.setLevel(level)
