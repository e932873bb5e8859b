"""Fuzzing: for any recipe and option, the command line works or ends with one user error."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from minitron_megatron.cli import app
from minitron_megatron.errors import MinitronError
from minitron_megatron.recipe import json_schema
from tests.recipes import tiny_recipe

bounded = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)

LEAVES = st.one_of(
    st.sampled_from([None, True, False, 0, -1, 1, 2, 3, 7, 10**6, 2**31, 2**63, 2**70, 0.5, 1e-300, 1e300]),
    st.sampled_from(
        [math.nan, math.inf, -math.inf, "", " ", "x", "1e3", "0x10", "\0", "\ud83d", "../..", "/", "~", "."]
    ),
    st.sampled_from([[], {}, [[]], {"": 1}, {"a": {"b": []}}, ["x"] * 50, [1, "x", None], "nan", "é" * 300, "a\nb"]),
    st.text(max_size=8),
    st.integers(),
    st.floats(),
)
KEYS = sorted({key for block in json_schema()["$defs"].values() for key in block["properties"]} | {"nonsense"})


def paths(node: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Yield the path of every node of a tree below its root."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [each for key, value in inner for each in ((*before, key), *paths(value, (*before, key)))]


def replaced(node: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    """Return a copy with one node changed; `...` from `change` removes it."""
    copy = node.copy()
    first, *rest = path
    new = replaced(copy[first], tuple(rest), change) if rest else change(copy[first])
    if new is ...:
        copy.pop(first)
    else:
        copy[first] = new
    return copy


@st.composite
def spoilt(draw: st.DrawFn, whole: Any) -> Any:
    """Draw a recipe with one to three values changed, removed, or added under unknown keys."""
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(paths(whole)))
        what = draw(st.sampled_from(["other", "gone", "more"]))
        leaf, key = draw(LEAVES), draw(st.sampled_from(KEYS))
        whole = replaced(
            whole,
            path,
            lambda old, what=what, leaf=leaf, key=key: (
                ... if what == "gone" else old | {key: leaf} if what == "more" and isinstance(old, dict) else leaf
            ),
        )
    return whole


def ends_well(*arguments: str) -> None:
    """Run a command; any exception must be a user error with one short message."""
    result = CliRunner().invoke(app, arguments)
    error = result.exception
    if isinstance(error, MinitronError):
        assert 0 < len(str(error)) < 2000, error
        assert "Traceback" not in str(error) and not str(error).endswith(": .")
    else:
        assert error is None or isinstance(error, SystemExit), (arguments, repr(error))


@pytest.fixture(scope="module")
def whole(material: Path) -> dict[str, Any]:
    recipe = tiny_recipe(material) | {"out": "/nowhere/run", "parallel": {"tp": 1}, "log": {}, "bench": {}, "seed": 1}
    recipe["score"] |= {"depth": {"metric": "loss", "lengths": [1]}, "statistic": {"batch": "l2"}}
    recipe["distill"] = recipe["distill"] | {"loss": {"divergence": "jsd", "beta": 0.5}, "phases": [{"tokens": 1024}]}
    return recipe | {"export": {"dtype": "bfloat16"}}


@bounded
@given(data=st.data())
def test_a_recipe_with_anything_in_it_is_counted_or_refused(whole: dict[str, Any], tmp_path: Path, data: Any) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(data.draw(spoilt(whole))))
    ends_well("estimate", str(path))
    ends_well("run", str(path), "--dry-run")


@bounded
@given(text=st.one_of(st.text(max_size=60), st.from_regex(r"[a-c&*!?:|>{}\[\]\"'#%@,\- \n\t0-9]{0,40}")))
def test_any_text_is_a_recipe_or_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    ends_well("estimate", str(path))
    ends_well("show", str(path))


@bounded
@given(
    text=st.text(max_size=30), key=st.sampled_from(["seed", "out", "distill", "data.sources", "prune.hidden", "a", ""])
)
def test_any_override_is_taken_or_refused(whole: dict[str, Any], tmp_path: Path, key: str, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(whole))
    ends_well("estimate", str(path), "--set", f"{key}={text}")


@bounded
@given(
    option=st.sampled_from(["--gpus", "--mfu", "--memory", "--out", "--set", "--task", "--checkpoint", "--nonsense"]),
    value=st.one_of(st.text(max_size=10), st.sampled_from(["nan", "inf", "-1", "0", "1e999", "9" * 40, "6/6", "-1/2"])),
)
def test_any_option_is_taken_or_refused(whole: dict[str, Any], tmp_path: Path, option: str, value: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(whole))
    ends_well("estimate", str(path), option, value)
    ends_well("watch", value)
    ends_well("init", value)
