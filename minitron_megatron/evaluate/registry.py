"""Lookup of the harness's tasks: only files that can name a task are parsed, for all 13,000 take most of a minute.

Metrics of the `evaluate` package are code from the Hugging Face hub; offline mode keeps it from downloading them.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
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

NAMED = re.compile(rb"^[\"']?(?:task|group|tag)[\"']?:(.*(?:\n[ \t]*-[^:\n]*$)*)", re.MULTILINE)
"""The value of a key that names tasks, groups or tags."""
NO_CONFIGURATIONS = (".py", ".pyc", ".md", ".jsonl", ".json", ".txt", ".ipynb", ".sh", ".csv", ".tsv", ".pdf", ".png")


@cache
def loader() -> TaskManager:
    """Return a TaskManager that builds tasks from configurations and indexes none by name."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False)


@cache
def registered(name: str) -> Entry | None:
    """Return the entry that the harness's own index has for a task, a group or a tag; None if there is none."""
    from lm_eval.tasks._index import TaskIndex
    from lm_eval.tasks._yaml_loader import load_yaml

    index: dict[str, Entry] = {}
    for path in sorted(_naming(name)):
        with suppress(Exception):  # files that the harness's index leaves out too
            TaskIndex.process_cfg(load_yaml(path, resolve_func=False), Path(path), index)
    return index.get(name)


@cache
def every_name() -> Set[str]:
    """Return the names of all tasks, groups and tags, for suggestions: a few words of descriptions are among them."""
    values = (value for text in _texts().values() for value in NAMED.findall(text))
    return {name.decode() for value in values for name in re.findall(rb"(?<![^\s\"',\[])[\w.+-]*\w", value)}


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


@cache
def _including() -> Mapping[str, Sequence[str]]:
    """Return name of a file, without its folder -> paths of the files that may include a file of this name."""
    part = re.compile(rb"^[\"']?include[\"']?:(.*\n?(?:[ \t]*-.*\n?)*)", re.MULTILINE)
    including = defaultdict(list)
    for path, text in _texts().items():
        for listed in part.findall(text):
            for included in re.findall(rb"[^\s\"'\[\],/]+(?=[\s\"'\],]|$)", listed):
                including[included.decode()].append(path)
    return including


def _naming(name: str) -> Set[str]:
    """Return the paths of all configurations that may give a task, group or tag this name, or list it."""
    scalar = rb"[\"'\[,\s]%b(?=[\"'\],\s]|$)" % re.escape(name.encode())
    line = re.compile(rb"^(?:[ \t]*-|[\"']?(?:task|group|tag)[\"']?:).*%b" % scalar, re.MULTILINE)
    found = {path for path, text in _texts().items() if name.encode() in text and line.search(text)}
    waiting = [*found]
    while waiting:
        more = set(_including().get(os.path.basename(waiting.pop()), ())) - found
        found |= more
        waiting += more
    return {path for path in found if path.endswith(".yaml")}
