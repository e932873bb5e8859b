"""A user's own things, from outside the package: the worked examples of CONTRIBUTING.md, as one plugin of a recipe."""

from __future__ import annotations

import json
import re
import shutil
import sys
import textwrap
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.errors import RecipeError
from minitron_megatron.files import read_json
from minitron_megatron.recipe import json_schema, load_recipe
from minitron_megatron.train import Training, TrainingSettings
from tests.cli.test_commands import call

Write = Callable[..., Path]
PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"
IMPORTS = """
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from minitron_megatron.align import REWARDS, Record, Reward
from minitron_megatron.convert import FAMILIES
from minitron_megatron.data import Batch
from minitron_megatron.files import write_json
from minitron_megatron.losses import DIVERGENCES, PREFERENCE_LOSSES, Entries, Pairs
from minitron_megatron.parallel import Topology
from minitron_megatron.records import REDUCTIONS
from minitron_megatron.run import STAGES, Context, Stage
from minitron_megatron.score import DEPTH_METRICS, DepthMetric, TokenMetric, leave_out
from minitron_megatron.train import OBJECTIVES, LMObjective
"""


def examples() -> str:
    """Return the code of the section "Adding a thing", without the training key, which is a line of the package."""
    section = PAGE.read_text().partition("## Adding a thing")[2].partition("**A training key**")[0]
    return IMPORTS + textwrap.dedent("\n".join(re.findall(r"^(?:    .*)?$", section, re.MULTILINE)))


@pytest.fixture
def extended(recipe_file: Write, material: Path, tmp_path: Path) -> Path:
    """A recipe that uses one thing of each kind from the plugin beside it."""
    shutil.copytree(material / "model", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"model_type": "llama_by_another_name"}))
    (tmp_path / "mine.py").write_text(examples())
    training = {"tokens": 4 * 8 * 16, "global_batch": 8, "micro_batch": 2, "warmup_steps": 1, "lr": 5e-3}
    changes: dict[str, Any] = {
        "model": str(tmp_path / "model"),
        "plugins": ["mine"],
        "correct": training | {"objective": "quiet"},
        "score": {
            "samples": 8,
            "micro_batch": 2,
            "statistic": {"batch": "rms", "sequence": "rms"},
            "depth": {"metric": "drift", "greedy": True},
        },
        "prune": {"ffn": 48, "layers": 4},
        "distill": training | {"loss": {"divergence": "l1"}},
        "random_baseline": False,
    }
    return recipe_file(**changes)


def test_one_thing_of_each_kind_comes_from_a_plugin_on_every_rank(extended: Path, tmp_path: Path) -> None:
    done = call("run", extended, "--set", "parallel.tp=2", ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "run"
    scored = read_json(run / "stages" / "score.json")["result"]
    assert (scored["statistic"]["batch"], scored["depth"]) == ("rms", "drift")
    depth = read_json(run / "scores" / "depth.json")
    assert depth["baseline"] == 0.0 and all(value > 0 for *_, value in depth["blocks"])
    assert read_json(run / "layers.json") == 4
    assert read_json(run / "stages" / "count.json")["result"] == {"layers": 4}
    assert read_json(run / "export" / "config.json")["model_type"] == "llama_by_another_name"


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("absent", None, r"recipe\.yaml: the module 'absent' of plugins is not in .* or on sys\.path\. Correct it"),
        ("broken", "1 / 0", r"'broken' of plugins cannot be imported: ZeroDivisionError: division by zero\. Correct"),
        ("needy", "import absent", r"'needy' of plugins cannot be imported: ModuleNotFoundError: No module named"),
        (
            "double",
            "from minitron_megatron.losses import DIVERGENCES\nDIVERGENCES['mse'] = object",
            "divergence 'mse' exists already. Give yours another name",
        ),
    ],
)
def test_a_plugin_that_cannot_be_imported_is_one_message(
    recipe_file: Write, tmp_path: Path, name: str, code: str | None, said: str
) -> None:
    if code is not None:
        (tmp_path / f"{name}.py").write_text(code)
    with pytest.raises(RecipeError, match=said):
        load_recipe(recipe_file(plugins=[name]))


def test_the_plugin_beside_the_recipe_is_the_one_that_is_imported(
    recipe_file: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of the same name comes earlier on `sys.path`, or its module is imported already."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setattr(sys, "path", [str(elsewhere), *sys.path])
    for name in ("own_plugin", "second_plugin"):
        (elsewhere / f"{name}.py").write_text("WHERE = 'elsewhere'")
        (tmp_path / f"{name}.py").write_text("WHERE = 'beside the recipe'")
    load_recipe(recipe_file(plugins=["own_plugin"]))
    assert import_module("own_plugin").WHERE == "beside the recipe"
    assert import_module("second_plugin").WHERE == "elsewhere"
    (tmp_path / "statistics.py").write_text("")
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "__init__.py").write_text("")
    for name, file in (("second_plugin", "second_plugin"), ("statistics", "statistics"), ("json", "__init__")):
        with pytest.raises(RecipeError, match=rf"{file}\.py is imported under that name already\. Rename yours\."):
            load_recipe(recipe_file(plugins=[name]))


def test_a_missing_plugin_is_exit_2(recipe_file: Write) -> None:
    done = call("estimate", recipe_file(plugins=["absent"]))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_training_key_is_declared_once() -> None:
    """A field of TrainingSettings is a key of the recipe's trainings, with its help, and reaches the training."""
    blocks = [json_schema()["$defs"][name]["properties"] for name in ("Correct", "Distill")]
    values = {name: getattr(TrainingSettings(), name) for name in TrainingSettings.model_fields}
    assert values.items() <= dict(Training.of(TrainingSettings(), steps=1, seed=0)).items()
    assert all(block[name]["description"] for block in blocks for name in values)
