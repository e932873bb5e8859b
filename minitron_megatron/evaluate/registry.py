"""Lookup of the harness's tasks. Its own index of all 13,000 files takes half a minute, so it is built only if needed.

Metrics of the `evaluate` package are code from the Hugging Face hub; offline mode keeps it from downloading them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry

__all__ = ["HarnessConfig", "every_name", "loader", "registered"]

os.environ.setdefault("HF_EVALUATE_OFFLINE", "1")  # read when the harness is imported

HarnessConfig = Mapping[str, Any]
"""Configuration of a task or group in the harness: the keys of its YAML file, with the functions that they name."""

NO_CONFIGURATIONS = (".py", ".pyc", ".md", ".jsonl", ".json", ".txt", ".ipynb", ".sh", ".csv", ".tsv", ".pdf", ".png")


@cache
def loader() -> TaskManager:
    """Return a TaskManager that builds tasks from configurations and indexes none by name."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False)


@cache
def registered(name: str) -> Entry | None:
    """Return the harness's entry of a task, a group or a tag; None if there is none."""
    return _single(name) or _index().get(name)


def every_name() -> list[str]:
    """Return the names of all tasks, groups and tags."""
    return list(_index())


@cache
def _index() -> Mapping[str, Entry]:
    from lm_eval.tasks import TaskManager

    index: Mapping[str, Entry] = TaskManager().task_index
    return index


@cache
def _texts() -> Mapping[str, bytes]:
    """Return path -> content of all files that may hold configurations, included files among them."""
    import lm_eval.tasks

    texts = {}
    for folder, _, names in os.walk(os.path.dirname(lm_eval.tasks.__file__)):
        for path in (os.path.join(folder, name) for name in names if not name.endswith(NO_CONFIGURATIONS)):
            with open(path, "rb") as file:
                texts[path] = file.read()
    return texts


def _single(name: str) -> Entry | None:
    """Return the entry of a task that one file defines and whose name no tag or group has; None: use the index."""
    from lm_eval.tasks._index import Entry, Kind
    from lm_eval.tasks._yaml_loader import load_yaml

    encoded, word = name.encode(), re.escape(name).encode()
    plain = re.compile(rb"^[\"']?task[\"']?:\s*[\"']?%b[\"']?\s*$" % word, re.MULTILINE)
    other = re.compile(rb"^\s*(-\s*|[\"']?(tag|group)[\"']?:.*)[\"'\s\[]?%b[\"'\s\],]*$" % word, re.MULTILINE)
    holding = {path: text for path, text in _texts().items() if encoded in text}
    naming = [path for path, text in holding.items() if plain.search(text)]
    if len(naming) != 1 or not naming[0].endswith(".yaml"):
        return None
    for path in (path for path, text in holding.items() if other.search(text)):
        config = load_yaml(Path(path), resolve_func=False)
        tags = config.get("tag") or []
        if name in ([tags] if isinstance(tags, str) else tags) or name == config.get("group"):
            return None
    config = load_yaml(Path(naming[0]), resolve_func=False)
    kind = Kind.PY_TASK if "class" in config else Kind.TASK
    return Entry(name=name, kind=kind, yaml_path=Path(naming[0]), cfg=config) if config.get("task") == name else None
