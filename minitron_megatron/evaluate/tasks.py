"""Tasks of lm-evaluation-harness: local files for downloads, results in its own form."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired

import numpy as np
from typing_extensions import TypedDict

from ..convert import read_config
from ..data import end_of_document, load_tokenizer, transformers_tokenizer
from ..errors import DataError, RecipeError, did_you_mean, first_line
from ..events import Listener, silent
from ..model import Model, evaluating
from ..parallel import Topology, broadcast_object
from .chat import CHAT_TASKS, Judge, check_chat_task, run_chat_task
from .decoding import TransformersTokenizer, generation_settings
from .extra_tasks import EXTRA_TASKS, PROGRAMS, graded
from .harness import HarnessMethods, harness_model
from .messages import named_errors, quiet, warn
from .metrics import check_metric, first_metric, metric_key, metric_value
from .predict import Predictor, RunBatches
from .programs import isolation
from .registry import HarnessConfig, every_name, loader, registered
from .shots import check_rows, check_shots, check_texts, with_files
from .suites import Task

if TYPE_CHECKING:
    from lm_eval.api.task import Task as HarnessTask

__all__ = ["HarnessResults", "check_tasks", "lower_is_better", "run_tasks", "scores_of"]

GROUP_KEYS = {"group", "group_alias", "task", "task_alias", "tag", "aggregate_metric_list", "metadata"}
"""Keys that describe a group itself; all other keys of its configuration apply to its tasks."""
SAMPLED = 16
"""Number of questions and examples that are checked before a task runs."""

HarnessResults = TypedDict(
    "HarnessResults",
    {
        "results": Mapping[str, Mapping[str, float | str | None]],
        "n-samples": Mapping[str, Mapping[str, int]],
        "higher_is_better": Mapping[str, Mapping[str, bool]],
        "programs": NotRequired[str],
    },
)
"""The harness's results: the keys that are read, and how programs were isolated. The harness adds more keys."""


def check_tasks(
    tasks: Sequence[Task],
    files: Path | None,
    *,
    run_code: bool = False,
    tokenizer: Path | None = None,
    model: Path | None = None,
    chat: bool = False,
    truncate: bool = False,
    judge: Judge | None = None,
) -> None:
    """Check tasks without running them and without downloads.

    tokenizer: folder of the tokenizer; None: do not check prompts. model: folder whose context length and generation
    settings apply; None: the tokenizer's. chat, truncate, judge: as in `run_tasks`. Raises RecipeError for a task that
    nobody knows, that lacks a package, a metric, a chat template or examples besides the scored questions, or whose
    answers are programs while `run_code` is false; DataError for missing or invalid files, and for prompts that do not
    fit.
    """
    lm = _checking_model(tokenizer, model or tokenizer, _user_of_template(tasks, chat), truncate) if tokenizer else None
    seen: set[str] = set()
    for task in tasks:
        if task.name in CHAT_TASKS:
            check_chat_task(task, files, lm, judge)
        firsts = set()
        for leaf, keys in _leaves(task.name).items():
            if leaf in seen:
                raise RecipeError(f"task {leaf} is listed twice, but results hold each task once. Remove one.")
            seen.add(leaf)
            if leaf not in CHAT_TASKS:
                config = _checked(task, leaf, keys, files, run_code)
                firsts.add(first_metric(config))
                _check_prompts(leaf, config, files, lm, chat)
        if task.metric is None and len(firsts) > 1:
            raise RecipeError(
                f"the tasks of {task.name} have different first metrics ({', '.join(sorted(map(str, firsts)))}), which "
                "cannot be averaged. Set a metric that all tasks have, or list the tasks one by one."
            )


def _checked(task: Task, leaf: str, keys: HarnessConfig, files: Path | None, run_code: bool) -> HarnessConfig:
    """Return the configuration of one task after checking that it can run."""
    if leaf in PROGRAMS and not run_code:
        raise RecipeError(
            f"task {leaf} runs programs that a model wrote, on this machine and with your permissions. "
            "Set `run_code` if this is acceptable, as in a container without a network."
        )
    config = _configured(task, leaf, files, keys)
    check_metric(leaf, config, task.metric)
    if "class" not in config:
        check_shots(leaf, config)
    if files is not None:
        check_rows(leaf, config, files)
    if leaf == "ifeval":
        _check_sentences()
    return config


def _user_of_template(tasks: Sequence[Task], chat: bool) -> str | None:
    """Return the setting or the task that needs a chat template, for messages; None if nothing does."""
    return "`chat`" if chat else next((f"task {task.name}" for task in tasks if task.name in CHAT_TASKS), None)


def _checking_model(folder: Path, model: Path, user: str | None, truncate: bool) -> HarnessMethods:
    """Return a harness model without weights. user: see `_user_of_template`. Raises RecipeError for a missing or broken
    chat template."""
    config = read_config(model)
    lm = harness_model(
        transformers_tokenizer(folder),
        end=end_of_document(folder, load_tokenizer(folder)),
        context=config.max_positions,
        vocab=config.shape.vocab,
        settings=generation_settings(model),
        truncate=truncate,
    )
    if user:
        try:
            lm.apply_chat_template([{"role": "user", "content": "one"}])
        except Exception as error:  # a template raises anything
            lines = str(error).strip().splitlines()
            raise RecipeError(
                f"{user} needs a chat template, but the tokenizer in {folder} has no working one: "
                f"{lines[0][:200].rstrip('.') if lines else type(error).__name__}. "
                f"Leave out {user}, or put a template into chat_template.jinja there."
            ) from error
    return lm


def _check_prompts(leaf: str, config: HarnessConfig, files: Path | None, lm: HarnessMethods | None, chat: bool) -> None:
    """Raise DataError if a model cannot take a task's settings, or, with local files, its first prompt."""
    if lm is not None and config.get("output_type", "generate_until") == "generate_until" and "class" not in config:
        lm.check_settings(config.get("generation_kwargs") or {})
    if files is None:
        return
    data = replace(config["custom_dataset"], most=max(SAMPLED, (config.get("num_fewshot") or 0) + 2))
    with quiet(), named_errors(leaf):
        (built,) = _built([{**config, "custom_dataset": data}]).values()
        check_texts(leaf, built, config["custom_dataset"])
        if lm is None:
            return
        built.build_all_requests(limit=1, **_chat_options(lm, chat))
    lm.checked(built.instances)


def _chat_options(lm: HarnessMethods, chat: bool) -> dict[str, object]:
    template = {"chat_template": lm.apply_chat_template, "tokenizer_name": lm.tokenizer_name} if chat else {}
    return {"apply_chat_template": chat, "fewshot_as_multiturn": True, **template}


def _check_sentences() -> None:
    """Raise DataError without NLTK's sentence splitter: IFEval needs it only after generation, and fails to say so."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError as error:
        raise DataError(
            "task ifeval needs NLTK's punkt_tab, which was not found and could not be downloaded. "
            "Set NLTK_DATA to a folder that has tokenizers/punkt_tab."
        ) from error


def run_tasks(
    model: Model,
    tasks: Sequence[Task],
    tokenizer: TransformersTokenizer,
    topology: Topology,
    *,
    files: Path | None = None,
    folder: Path | None = None,
    limit: int | None = None,
    truncate: bool = False,
    chat: bool = False,
    judge: Judge | None = None,
    answers: Path | None = None,
    seed: int = 0,
    micro_batch: int = 8,
    run: RunBatches | None = None,
    listener: Listener = silent,
) -> HarnessResults:
    """Run tasks and return the harness's results, samples included, on every rank. Collective over the world.

    files: folder with `<task>/<split>.jsonl`, with the same fields as the harness's data, instead of downloads. folder:
    folder of the generation settings; None: the tokenizer's. limit: questions per task. truncate: drop the beginnings
    of prompts longer than the context. chat: apply the tokenizer's chat template, as tasks of `CHAT_TASKS` always do.
    judge: rates the answers of MT-Bench; None: they have no score. answers: beginning of the paths to which the answers
    of `CHAT_TASKS` are written, `<answers>-<task>.jsonl`; None: they are not. seed: seed of sampling. run: replaces the
    model's forward pass. Programs that the model writes run only on the first rank; `programs` in the results says how
    they were isolated.
    """
    predictor = Predictor(model, topology, micro_batch=micro_batch, run=run)
    tokenizer_folder = Path(tokenizer.name_or_path)
    lm = harness_model(
        tokenizer,
        end=end_of_document(tokenizer_folder, load_tokenizer(tokenizer_folder)),
        context=predictor.positions,
        vocab=predictor.vocab,
        settings=generation_settings(folder or tokenizer_folder),
        predictor=predictor,
        truncate=truncate,
        seed=seed,
        listener=listener,
    )
    own = [task for task in tasks if task.name in CHAT_TASKS]
    with evaluating(model):
        found = _run_harness(lm, [task for task in tasks if task not in own], files, limit=limit, chat=chat)
        for task in own:
            path = answers and answers.with_name(f"{answers.name}-{task.name.replace('_', '-')}.jsonl")
            one = run_chat_task(lm, task, files, limit=limit, judge=judge, answers=path, listener=listener)
            found["results"][task.name] = one["results"]
            found["n-samples"][task.name] = one["samples"]
            found["higher_is_better"][task.name] = one["higher_is_better"]
            if topology.rank == 0:
                for note in one["notes"]:
                    warnings.warn(note, stacklevel=2)
    return found


def _run_harness(
    lm: HarnessMethods, tasks: Sequence[Task], files: Path | None, *, limit: int | None, chat: bool
) -> Any:
    """Run the harness's tasks; return its results, of which `run_tasks` tells, on every rank."""
    from lm_eval import evaluate

    leaves = [(task, leaf, keys) for task in tasks for leaf, keys in _leaves(task.name).items()]
    if not leaves:
        return {"results": {}, "n-samples": {}, "higher_is_better": {}}
    first = lm.predictor.topology.rank == 0
    with _seeded(), quiet() as messages, named_errors():
        configs = [_configured(task, leaf, files, keys, run_code=first) for task, leaf, keys in leaves]
        found = evaluate(
            lm=lm,
            task_dict={"tasks": _built(configs), "groups": {}, "group_map": {}},
            limit=limit,
            bootstrap_iters=0,
            confirm_run_unsafe_code=True,
            apply_chat_template=chat,
            fewshot_as_multiturn=True,
        )
    if first:
        warn(messages)
        if any(leaf in PROGRAMS for _, leaf, _ in leaves):
            found["programs"] = isolation().description
    return broadcast_object(json.loads(json.dumps(found, default=str)) if first else None)


def _built(configs: Sequence[HarnessConfig]) -> dict[str, HarnessTask]:
    """Return task name -> the harness's task, with data loaded and examples seeded as `simple_evaluate` does."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    built: dict[str, HarnessTask] = {}
    for config in configs:
        with named_errors(str(config["task"])):
            built |= loader().load([config])["tasks"]
    for task in built.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return built


@contextmanager
def _seeded() -> Iterator[None]:
    """Seed Python's and NumPy's generators as `simple_evaluate` does, and restore them at the end."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def scores_of(results: HarnessResults, tasks: Sequence[Task]) -> dict[str, float | None]:
    """Return task -> its number for tables, for a group the mean over all its questions; None if nobody judged it."""
    scores: dict[str, float | None] = {}
    for task in tasks:
        leaves = list(_leaves(task.name))
        counts = [results["n-samples"][leaf]["effective"] for leaf in leaves]
        values = [metric_value(leaf, results["results"][leaf], task.metric) for leaf in leaves]
        known = [value for value in values if value is not None]
        total = sum(value * count for value, count in zip(known, counts, strict=True)) if known else None
        scores[task.name] = None if total is None else total / sum(counts)
    return scores


def lower_is_better(results: HarnessResults, task: Task) -> bool:
    """Return whether a lower number is better for a task, as for a perplexity."""
    leaf = next(iter(_leaves(task.name)))
    metric = task.metric[0] if isinstance(task.metric, tuple) else task.metric
    key = metric_key(leaf, results["results"][leaf], metric)
    return results["higher_is_better"][leaf].get(key.split(",")[0]) is False


def _leaves(name: str) -> dict[str, HarnessConfig]:
    """Return the tasks of a task, group or tag -> keys set by its groups. Raises RecipeError for an unknown name."""
    if name in EXTRA_TASKS or name in CHAT_TASKS:
        return {name: {}}
    entry = registered(name)
    if entry is None:
        near = did_you_mean(name, [*every_name(), *EXTRA_TASKS, *CHAT_TASKS])
        raise RecipeError(f"there is no task {name}.{near} Correct its name, or leave it out.")
    if entry.kind.name == "TAG":
        return {leaf: keys for each in sorted(entry.tags) for leaf, keys in _leaves(each).items()}
    return _members(name, entry.cfg) if entry.kind.name == "GROUP" else {name: {}}


def _members(group: str, config: HarnessConfig) -> dict[str, HarnessConfig]:
    """Return the tasks of a group's configuration, in the form of `_leaves`."""
    found: dict[str, HarnessConfig] = {}
    shared = {key: value for key, value in config.items() if key not in GROUP_KEYS}
    for part in config["task"]:
        keys = {} if isinstance(part, str) else {key: part[key] for key in part if key not in GROUP_KEYS}
        if isinstance(part, str):
            inside = _leaves(part)
        elif isinstance(part.get("task"), list):
            inside = _members(f"{group}::{part.get('group')}", part)
        elif (named := part.get("task", part.get("group"))) and registered(named):
            inside = _leaves(named)
        else:
            raise RecipeError(f"{group} defines a task of its own, {named}, which is not supported. Name other tasks.")
        found |= {leaf: {**own, **shared, **keys} for leaf, own in inside.items()}
    return found


def _configured(
    task: Task,
    name: str,
    files: Path | None,
    keys: HarnessConfig | None = None,
    *,
    run_code: bool = False,
) -> HarnessConfig:
    """Return the harness's configuration of a task, with its groups' keys and our shots, sampling and data."""
    own = _own(task, name, run_code) if name in EXTRA_TASKS or name in PROGRAMS else _registered(name, True)
    config = {**own, **(keys or {})}
    config.pop("tag", None)
    config["dataset_kwargs"] = {**(config.get("dataset_kwargs") or {}), "trust_remote_code": False}
    if task.shots is not None:
        config["num_fewshot"] = task.shots
    if config.get("output_type") == "loglikelihood_rolling":
        config["num_fewshot"] = 0  # such a task has no prompt to put examples into
    if task.temperature is not None:
        sampling = {"do_sample": task.temperature > 0, "temperature": task.temperature, "top_p": task.top_p}
        config["generation_kwargs"] = {**config.get("generation_kwargs", {}), **sampling}
    if task.answers > 1:
        config["repeats"] = task.answers
    if files is not None and "class" in config:
        raise RecipeError(f"task {name} is Python code in the harness that cannot read local files. Leave it out.")
    return with_files(name, config, files) if files is not None else config


def _own(task: Task, name: str, run_code: bool) -> HarnessConfig:
    if name in EXTRA_TASKS:
        return dict(EXTRA_TASKS[name])
    if task.shots:
        raise RecipeError(
            f"task {name} with examples (shots: {task.shots}) is not supported. Set its shots to 0, as the papers do."
        )
    return graded(name, _registered(name, False), run_code)


def _registered(name: str, functions: bool) -> HarnessConfig:
    """Return a task's configuration. functions: import the functions it names; some need packages or a download."""
    from lm_eval.tasks._yaml_loader import load_yaml

    entry = registered(name)
    assert entry is not None
    try:
        return load_yaml(entry.yaml_path, resolve_func=functions)
    except ImportError as error:
        raise RecipeError(
            f"task {name} needs a package that is not installed: {error}. Install lm-eval with its extra for it, "
            "such as `pip install 'lm-eval[ifeval]'`."
        ) from error
    except Exception as error:  # task modules may raise anything; some download on import
        cause = first_line(error)[:200]
        raise RecipeError(f"task {name} cannot be loaded by the harness: {cause}. Leave it out.") from error
