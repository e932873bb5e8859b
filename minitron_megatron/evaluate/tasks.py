"""Tasks of lm-evaluation-harness: local files for downloads, results in its own form."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

from ..errors import DataError, RecipeError, did_you_mean
from ..events import Listener, silent
from ..parallel import Topology, broadcast_object
from .harness import harness_model
from .own import OWN, PROGRAMS, graded
from .predict import Predictor, Run
from .suites import Task

__all__ = ["check_tasks", "lower_is_better", "run_tasks", "scores_of"]


SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
"""What a task's configuration calls its data."""


def check_tasks(tasks: Sequence[Task], files: Path | None, *, run_code: bool = False) -> None:
    """Raises RecipeError for a task that the harness does not know, that lacks a package, or whose answers are programs
    where `run_code` does not say that they may run; DataError for one without its files."""
    for task in tasks:
        for leaf in _leaves(task.name):
            if leaf in PROGRAMS and not run_code:
                raise RecipeError(
                    f"task {leaf} runs programs that a model wrote, on this machine and with your rights. "
                    "Set evaluate.run_code where that may be, as in a container without a network."
                )
            _configured(task, leaf, files)
            if leaf == "ifeval":
                _check_sentences()


def _check_sentences() -> None:
    """IFEval counts sentences after its questions are answered; its own download fails without an error."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError as error:
        raise DataError(
            "task ifeval needs NLTK's punkt_tab, which is not here and could not be downloaded. "
            "Set NLTK_DATA to a folder that has tokenizers/punkt_tab."
        ) from error


def run_tasks(
    model: Any,
    tasks: Sequence[Task],
    tokenizer: Any,
    topology: Topology,
    *,
    files: Path | None = None,
    limit: int | None = None,
    truncate: bool = False,
    chat: bool = False,
    seed: int = 0,
    micro_batch: int = 8,
    run: Run | None = None,
    listener: Listener = silent,
) -> dict[str, Any]:
    """Runs tasks and returns the harness's own results, samples included, on every rank. Collective over the world.

    files: `FOLDER/<task>/<split>.jsonl` with the fields that the harness's own data have, in the place of downloads.
    limit: questions a task. truncate: drop the beginnings of prompts longer than the context. chat: prompts go through
    the tokenizer's chat template. seed: of what is sampled. run: in the place of the model's forward pass. Programs
    that the model writes run on the first rank alone.
    """
    from lm_eval import simple_evaluate

    predictor = Predictor(model, topology, micro_batch=micro_batch, run=run)
    lm = harness_model(predictor, tokenizer, truncate=truncate, seed=seed, listener=listener)
    first = topology.rank == 0
    with _quiet():
        found = simple_evaluate(
            model=lm,
            tasks=[_configured(task, leaf, files, run_code=first) for task in tasks for leaf in _leaves(task.name)],
            task_manager=_manager(),
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=chat,
            confirm_run_unsafe_code=True,
        )
    # the harness answers the first rank of a machine alone
    return broadcast_object(json.loads(json.dumps(found, default=str)) if first else None)


def scores_of(results: Mapping[str, Any], tasks: Sequence[Task]) -> dict[str, float]:
    """Task -> the number that stands in tables; of a group the mean over all its questions."""
    scores = {}
    for task in tasks:
        leaves = _leaves(task.name)
        counts = [results["n-samples"][leaf]["effective"] for leaf in leaves]
        values = [_metric(results["results"][leaf], task.metric) for leaf in leaves]
        scores[task.name] = sum(v * n for v, n in zip(values, counts, strict=True)) / sum(counts)
    return scores


def lower_is_better(results: Mapping[str, Any], task: Task) -> bool:
    """Whether less of a task's number is better, as of a perplexity."""
    leaf = _leaves(task.name)[0]
    key = _key(results["results"][leaf], task.metric if not isinstance(task.metric, tuple) else task.metric[0])
    return results["higher_is_better"][leaf].get(key.split(",")[0]) is False


def _metric(found: Mapping[str, Any], name: str | tuple[str, ...] | None) -> float:
    """The number of a metric, or the mean of several."""
    if isinstance(name, tuple):
        return sum(_metric(found, each) for each in name) / len(name)
    return float(found[_key(found, name)])


def _key(found: Mapping[str, Any], name: str | None) -> str:
    """The harness writes `metric,filter`: a metric's first filter, or the first metric where none is so called."""
    plain = [key for key in found if "," in key and "_stderr," not in key]
    return next((key for key in plain if key.split(",")[0] == name), plain[0])


@cache
def _manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _leaves(name: str) -> list[str]:
    """A task, or all of a group's or a tag's. Raises RecipeError where there is none of the name."""
    index = _manager().task_index
    if name in OWN:
        return [name]
    if name not in index:
        raise RecipeError(f"there is no task {name}.{did_you_mean(name, [*index, *OWN])}")
    kind = index[name].kind.name
    if kind == "TAG":
        return [leaf for leaf, entry in index.items() if name in entry.tags]
    if kind != "GROUP":
        return [name]
    parts = [each if isinstance(each, str) else each.get("task", each.get("group")) for each in index[name].cfg["task"]]
    return [leaf for part in parts for leaf in _leaves(part)]


def _configured(task: Task, name: str, files: Path | None, *, run_code: bool = False) -> dict[str, Any]:
    """The harness's own configuration of a task, with our shots, sampling and data."""
    config = _own(task, name, run_code) if name in OWN or name in PROGRAMS else _registered(name, True)
    config.pop("tag", None)
    if files is not None:
        splits = _local(name, files)
        config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": splits}}
        config |= {key: None for key in SPLITS if config.get(key) not in splits}
    if task.shots is not None:
        config["num_fewshot"] = task.shots
    if task.temperature is not None:
        how = {"do_sample": task.temperature > 0, "temperature": task.temperature, "top_p": task.top_p}
        config["generation_kwargs"] = {**config.get("generation_kwargs", {}), **how}
    if task.answers > 1:
        config["repeats"] = task.answers
    return config


def _own(task: Task, name: str, run_code: bool) -> dict[str, Any]:
    if name in OWN:
        return dict(OWN[name])
    if task.shots:
        raise RecipeError(
            f"task {name} with {task.shots} shots is not supported. Set its shots to 0, as the papers do."
        )
    return graded(name, _registered(name, False), run_code)


def _registered(name: str, functions: bool) -> dict[str, Any]:
    """functions: with those that it names; their modules are imported, and some need packages or a download."""
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        return load_yaml(_manager().task_index[name].yaml_path, resolve_func=functions)
    except ImportError as error:
        raise RecipeError(
            f"task {name} needs a package that is not here: {error}. Install lm-eval with its extra for it, such as "
            "`pip install 'lm-eval[ifeval]'`."
        ) from error


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
