"""Metrics of a task: names in its configuration and values in its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..errors import RecipeError, did_you_mean
from .extra_tasks import EXTRA_TASKS, PROGRAMS
from .registry import HarnessConfig

__all__ = ["check_metric", "first_metric", "metric_key", "metric_value"]

Metric = str | tuple[str, ...] | None
"""`name` or `name,filter`; a tuple: the mean of several metrics; None: the task's first metric."""


def check_metric(task: str, config: HarnessConfig, metric: Metric) -> None:
    """Raise RecipeError if a task's configuration shows that it has no such metric."""
    _refuse_downloads(task, config)
    known, open_ended = _metrics(config)
    filters = [each["name"] for each in config.get("filter_list") or [{"name": "none"}]]
    for each in [metric] if isinstance(metric, str) else metric or ():
        name, _, chosen = each.partition(",")
        if name not in known and not open_ended:
            raise _unknown(task, name, known)
        if chosen and chosen not in filters:
            raise RecipeError(
                f"task {task} has no filter {chosen} for its metric {name}.{_hint(chosen, filters)} "
                f"It has {', '.join(filters)}."
            )


def _refuse_downloads(task: str, config: HarnessConfig) -> None:
    """Raise RecipeError for a metric that is not part of the harness: it would download and run code for it."""
    from lm_eval.api.registry import METRIC_REGISTRY

    for each in config.get("metric_list") or [] if config.get("process_results") is None else []:
        name = each["metric"]
        if each.get("hf_evaluate") or (isinstance(name, str) and name not in METRIC_REGISTRY):
            raise RecipeError(
                f"task {task} is scored by {name}, which is code from the Hugging Face hub and is never run. "
                "Leave the task out."
            )


def first_metric(config: HarnessConfig) -> str | None:
    """Return the name of a task's first metric; None if the configuration names none."""
    return next(iter(_metrics(config)[0]), None)


def metric_value(task: str, found: Mapping[str, float | str | None], metric: Metric) -> float | None:
    """Return the value of a metric in a task's results, or the mean of several; None if one is not known."""
    values = [found[metric_key(task, found, each)] for each in (metric if isinstance(metric, tuple) else (metric,))]
    return None if None in values else sum(float(value or 0) for value in values) / len(values)


def metric_key(task: str, found: Mapping[str, float | str | None], metric: str | None) -> str:
    """Return the key `metric,filter` of a metric in the harness's results; without a filter name, the first filter.

    Raises RecipeError if the results have no such metric.
    """
    keys = [key for key in found if "," in key and "_stderr," not in key]
    fitting = keys if metric is None else [key for key in keys if metric in (key, key.split(",")[0])]
    if not fitting:
        raise _unknown(task, str(metric), list(dict.fromkeys(key.split(",")[0] for key in keys)))
    return fitting[0]


def _metrics(config: HarnessConfig) -> tuple[list[str], bool]:
    """Return (metric names, whether others are possible): a metric function may return several under other names."""
    from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY

    if "class" in config:
        return [], True
    listed = config.get("metric_list")
    if listed is None:
        return list(DEFAULT_METRIC_REGISTRY[config.get("output_type", "generate_until")]), False
    metrics = [each["metric"] for each in listed]
    names = [each if isinstance(each, str) else each.__name__ for each in metrics]
    return names, any(map(callable, metrics)) and config.get("task") not in {*EXTRA_TASKS, *PROGRAMS}


def _unknown(task: str, name: str, known: Sequence[str]) -> RecipeError:
    return RecipeError(f"task {task} has no metric {name}.{_hint(name, known)} It has {', '.join(known) or 'none'}.")


def _hint(word: str, known: Sequence[str]) -> str:
    near = [each for each in known if each.startswith(word) or word.startswith(each)]
    return did_you_mean(word, known) or (f" Did you mean {near[0]!r}?" if near else "")
