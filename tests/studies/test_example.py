"""The studies' own teacher and recipe: its text, its training, and that every study fits it."""

from __future__ import annotations

import json
import re
import sys
import warnings
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType

import pytest
import torch

from minitron_megatron.convert import folder_hash, read_config, temporary_outline
from minitron_megatron.layout import Shape, parameters
from minitron_megatron.model import ModelConfig
from minitron_megatron.studies import load_study, plan_study, shipped
from minitron_megatron.studies.quantities import parameters_of
from tests.guide import ROOT
from tests.limits import HANGS

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(["tests.warm.imports"])
FOLDER = ROOT / "examples" / "studies"


def script() -> ModuleType:
    """Return the script as a module; it imports its neighbours of the quickstart by their bare names."""
    spec = spec_from_file_location("studies_make_teacher", FOLDER / "make_teacher.py")
    assert spec is not None and spec.loader is not None
    module, before = module_from_spec(spec), (list(sys.path), set(sys.modules))
    spec.loader.exec_module(module)
    sys.path[:] = before[0]
    for name in {"corpus", "make_teacher", "tokenizer"} - before[1]:
        sys.modules.pop(name, None)
    return module


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the script, on a machine with two modules and one package."""
    made = script()
    files = {
        "lib/a": "x = 1\n",
        "lib/b": '"""Words."""\nx = 1\n',
        "packages/pack/b": '"""Words."""\nx = 1\n',  # as in the library
        "packages/pack/c": "y = 2\n",
        "packages/pack/long": "z = 3\n" * 40_000,
        "packages/pack/template": "class {{ name }}:\n",
        "packages/pack/tests/d": "w = 4\n",
        "packages/other/e": "v = 5\n",
    }
    for name, text in files.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    places = {"stdlib": tmp_path / "lib", "purelib": tmp_path / "packages"}
    monkeypatch.setattr(made.sysconfig, "get_path", lambda name: str(places[name]))
    monkeypatch.setattr(made, "PACKAGES", ("pack",))
    return made


def test_its_text_is_each_module_once(machine: ModuleType) -> None:
    assert list(machine.sources()) == [("a", "x = 1\n"), ("b", '"""Words."""\nx = 1\n'), ("pack/c", "y = 2\n")]


def test_a_fiftieth_is_held_out_by_name(machine: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 150 < sum(machine.held_out(f"package/module_{n}") for n in range(10_000)) < 250
    monkeypatch.setattr(machine, "held_out", lambda name: name == "pack/c")
    machine.write_text(tmp_path / "out")
    found = {
        path.stem: [json.loads(line)["module"] for line in path.read_text().splitlines()]
        for path in (tmp_path / "out").iterdir()
    }
    assert found == {"code": ["a", "b"], "code.valid": ["pack/c"], "prose": ["b"], "prose.valid": []}


def write_pattern(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for file in ("code", "prose", "code.valid", "prose.valid"):
        lines = [json.dumps({"text": f"def {file[:4]}_{n}(x):\n    return x + {n}\n" * 20}) + "\n" for n in range(99)]
        (folder / f"{file}.jsonl").write_text("".join(lines))


def make_small(work: Path) -> None:
    torch.set_num_threads(1)
    shape = Shape(layers=1, hidden=16, ffn=32, heads=2, kv_groups=1, head_dim=8, vocab=300, tied=True)
    make = partial(script().Teacher, shape, write_pattern, sequence=16, batch=8, dtype=torch.bfloat16)
    make(checkpoint_every=2).make(work, work / "teacher", 3)


def test_a_teacher_is_trained_and_made_again(tmp_path: Path) -> None:
    """The second time it goes on from its checkpoint, to the same weights."""
    hashes = []
    for _ in range(2):
        process = FORKS.Process(target=make_small, args=(tmp_path,))
        process.start()
        process.join(HANGS)
        assert process.exitcode == 0
        hashes.append(folder_hash(tmp_path / "teacher"))
    assert hashes[0] == hashes[1]
    assert read_config(tmp_path / "teacher").shape.vocab == 300
    steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["done"] for line in steps] == [1, 2, 3, 3]
    assert "loss_code" in steps[-1] and "loss_prose" in steps[-1]


@pytest.mark.parametrize("name", [name for name, _ in shipped()])
def test_every_study_has_students_of_the_right_size(name: str, tmp_path: Path) -> None:
    """Also those that are to be of equal size: no axis is too coarse. The page has every study."""
    teacher = script().STUDIES.shape
    outline = temporary_outline(ModelConfig(teacher, source={"model_type": "llama"}), torch.float32, None)
    page = (FOLDER / "README.md").read_text()
    assert len(re.findall(rf"[ |]{name}[ ;]", page)) >= 2  # in the loop and in the table of costs
    [other] = re.findall(r'other="([^"]*)"', page)
    sets = [f"model={outline}", *(re.findall(r"--set (\S+)", other) if name in ("correction", "phases") else ())]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        plan = plan_study(name, load_study(name), FOLDER / "recipe.yaml", sets, tmp_path, seeds=1)
    assert len(plan.jobs) == len(plan.study.arms)
    assert 0.35 < parameters_of(plan.jobs[0].recipe) / parameters(teacher) < 0.8 or plan.study.set.get("prune")
