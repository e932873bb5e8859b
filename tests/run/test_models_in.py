"""A recipe's model may be a name of the Hub or a Megatron checkpoint: the run is that of its Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from minitron_megatron.convert import load_hf
from minitron_megatron.errors import FileError
from minitron_megatron.files import read_json
from minitron_megatron.forecast import estimate
from minitron_megatron.model import save_megatron_lm
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe
from minitron_megatron.run import dry_run, run
from minitron_megatron.run_folder import RunFolder
from minitron_megatron.testing import Pool
from tests.cli.test_commands import call, say
from tests.formats import COMMIT, model_of_the_hub

Write = Callable[..., Path]


def until_pruned(topology: Topology, recipe: Path) -> str:
    keys = load_recipe(recipe)
    for stage in ("prepare", "score", "prune"):
        done = run(keys, topology, only=stage)
    return str(done["prune"]["hash"])


def save(topology: Topology, model: Path, to: Path) -> None:
    save_megatron_lm(load_hf(model, topology), to, topology, tokenizer=model)


@pytest.fixture
def recipe_of(recipe_file: Write) -> Write:
    def write(name: str, **changes: object) -> Path:
        return recipe_file(f"{name}.yaml", correct=None, random_baseline=False, **changes)

    return write


def test_a_megatron_checkpoint_runs_at_other_layouts_as_its_hugging_face_folder(
    pool: Pool, recipe_of: Write, material: Path, tmp_path: Path
) -> None:
    pool.run(save, material / "model", tmp_path / "lm")
    plain = recipe_of("plain", out=str(tmp_path / "plain"))
    megatron = recipe_of("megatron", model=str(tmp_path / "lm"), parallel={"tp": 2, "pp": 2})
    predicted = [estimate(load_recipe(each)) for each in (megatron, plain)]
    assert predicted[0].disk_bytes == predicted[1].disk_bytes + 4 * predicted[1].teacher_parameters
    assert predicted[0].student == predicted[1].student and predicted[0].stage_flops == predicted[1].stage_flops
    assert [step.state for step in dry_run(load_recipe(megatron))] == ["run"] * 6
    assert not load_recipe(megatron).out.exists(), "neither of them writes"
    [expected] = pool.run(until_pruned, plain)
    assert set(pool.run(until_pruned, megatron, tp=2, pp=2)) == {expected}
    shutil.rmtree(tmp_path / "lm")
    assert [step.state for step in dry_run(load_recipe(megatron))] == ["done"] * 3 + ["run"] * 3


def test_its_tokenizer_is_given_or_named_and_no_other_models(
    pool: Pool, recipe_of: Write, material: Path, tmp_path: Path
) -> None:
    pool.run(save, material / "model", tmp_path / "lm")
    shutil.copytree(material / "model", tmp_path / "here", ignore=shutil.ignore_patterns("*.safetensors"))
    (tmp_path / "empty").mkdir()
    shutil.copytree(tmp_path / "here", tmp_path / "other")
    other = json.loads((tmp_path / "here" / "tokenizer.json").read_text())
    other["model"]["vocab"]["<end>"] = 9999
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(other))
    for tokenizer, message in (
        (str(tmp_path / "here"), ""),
        (str(tmp_path / "empty"), "holds no tokenizer"),
        (str(tmp_path / "other"), f"The tokenizer in {tmp_path}/other ends documents with '<end>' (9999)"),
    ):
        done = call("run", recipe_of("given", model=str(tmp_path / "lm"), tokenizer=tokenizer), "--dry-run")
        assert (done.returncode, message in done.stderr) == (2 if message else 0, True)
    done = call("run", recipe_of("needless", tokenizer=str(tmp_path / "here")), "--dry-run")
    assert done.returncode == 2 and "is a Megatron checkpoint: each has its own. Remove tokenizer." in " ".join(
        done.stderr.split()
    )
    started = yaml.safe_load(say("init", tmp_path / "lm", "--tokenizer", tmp_path / "here"))
    assert (started["model"], started["tokenizer"]) == (str(tmp_path / "lm"), str(tmp_path / "here"))
    assert "num hidden layers" in say("show", tmp_path / "lm")


def test_a_model_of_the_hub_runs_from_the_cache_and_its_commit_is_kept(
    recipe_of: Write, material: Path, tmp_path: Path
) -> None:
    offline = model_of_the_hub(tmp_path / "hub", material / "model")
    recipe = recipe_of("hub", model="owner/tiny@main")
    for verb in (["run", recipe, "--dry-run"], ["estimate", recipe], ["init", "owner/tiny"], ["show", "owner/tiny"]):
        done = call(*verb, **offline)
        assert done.returncode == 0, done.stderr
    done = call("prepare", recipe, **offline)
    assert done.returncode == 0, done.stderr
    folder = RunFolder(load_recipe(recipe).out)
    assert read_json(folder.models)["model"]["commit"] == COMMIT
    assert yaml.safe_load(folder.recipe.read_text())["model"] == "owner/tiny@main"
    later = tmp_path / "hub" / "models--owner--tiny" / "refs" / "main"
    later.write_text("f" * 40)
    done = call("run", recipe, "--dry-run", **offline)
    assert "prepare    done" in done.stdout, "the branch has moved, the run keeps its commit"
    done = call("run", recipe, **offline)
    assert done.returncode == 0, done.stderr
    assert "base_model: owner/tiny\n" in (folder.model("export") / "README.md").read_text()


def test_without_network_and_cache_it_is_one_message(recipe_of: Write, material: Path, tmp_path: Path) -> None:
    offline = model_of_the_hub(tmp_path / "hub", material / "model")
    for model, verbs, message in (
        ("owner/absent", 4, "owner/absent is not a folder here, and cannot be downloaded from the Hugging Face Hub"),
        ("owner/tiny@absent", 1, "owner/tiny@absent is not a folder here"),
    ):
        recipe = recipe_of("absent", model=model)
        for verb in (["run", recipe], ["estimate", recipe], ["init", model], ["show", model])[:verbs]:
            done = call(*verb, **offline)
            assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not load_recipe(recipe).out.exists()


def test_a_model_of_pickles_alone_is_refused_with_the_command(recipe_of: Write, material: Path, tmp_path: Path) -> None:
    offline = model_of_the_hub(tmp_path / "hub", material / "model")
    next((tmp_path / "hub").glob("*/snapshots/*/model.safetensors")).unlink()
    done = call("prepare", recipe_of("pickles", model="owner/tiny"), **offline)
    assert done.returncode == 2
    assert "owner/tiny has no model.safetensors" in done.stderr and "old, new = '\"'\"'owner/tiny'\"'\"'" in done.stderr


def test_damaged_records_name_their_file(recipe_of: Write, tmp_path: Path) -> None:
    recipe = recipe_of("damaged")
    folder = RunFolder(load_recipe(recipe).out)
    folder.path.mkdir()
    folder.models.write_text(json.dumps({"model": 3}))
    with pytest.raises(FileError, match=r"models\.json"):
        dry_run(load_recipe(recipe))
