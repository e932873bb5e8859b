"""A student of its own is distilled without pruning, from any teacher of the same tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml

from minitron_megatron.convert import folder_hash, read_config, transformers_model
from minitron_megatron.errors import DataError, MinitronError, RecipeError
from minitron_megatron.events import silent
from minitron_megatron.files import read_json
from minitron_megatron.forecast import estimate
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe, resolved
from minitron_megatron.report import describe, report_run
from minitron_megatron.run import dry_run, hand_over, run
from minitron_megatron.run.context import Context
from minitron_megatron.run_folder import RunFolder
from minitron_megatron.testing import Pool
from tests.convert.conftest import make_folder
from tests.recipes import tiny_recipe
from tests.tiny import SHAPE

Write = Callable[..., Path]
PADDED = SHAPE.vocab + 9
FILES = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def students(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a Qwen2 and a Nemotron that have the Llama's tokenizer; one has a longer vocabulary, one the same."""
    folder = tmp_path_factory.mktemp("students")
    for kind, vocab in (("qwen2", PADDED), ("nemotron", SHAPE.vocab)):
        make_folder(folder / kind, kind, vocab_size=vocab)
        for file in FILES:
            shutil.copy(material / "model" / file, folder / kind / file)
    return folder


@pytest.fixture
def recipe_of(recipe_file: Write, students: Path) -> Write:
    def write(student: str, **changes: Any) -> Path:
        path = students / student if (students / student).exists() else Path(student)
        return recipe_file(**{"student": str(path), "prune": None, "random_baseline": False, "correct": None} | changes)

    return write


def curve(topology: Topology, recipe: Path) -> list[float]:
    """Run a recipe; return the losses of its distillation."""
    losses: list[float] = []
    run(
        load_recipe(recipe),
        topology,
        listener=lambda event: (
            losses.append(event.values["loss"]) if event.label == "distill" and "loss" in event.values else None
        ),
    )
    return losses


def naive_first_loss(topology: Topology, recipe: Path) -> float:
    """Return the forward KL of the first step over the entries that both vocabularies have, by transformers."""
    keys = load_recipe(recipe)
    assert keys.student is not None
    done = {"prepare": read_json(RunFolder(keys.out).record("prepare"))["result"]}
    context, [phase] = Context(keys, topology, silent, done, str), resolved(keys.distill, keys.data)
    total = count = torch.zeros(())
    with torch.no_grad():
        models = [transformers_model(folder, torch.float32) for folder in (keys.model, keys.student)]
        for batch in context.training_batches(phase, keys.seed)(0):
            teacher, student = (F.log_softmax(m(batch.tokens).logits[..., : SHAPE.vocab].double(), -1) for m in models)
            divergence = (teacher.exp() * (teacher - student)).sum(-1)
            total, count = total + (divergence * batch.mask).sum(), count + batch.mask.sum()
    return float(total / count)


@pytest.mark.parametrize("kind", ["qwen2", "nemotron"])
def test_another_family_learns_from_the_teacher_at_every_layout(
    pool: Pool, recipe_of: Write, students: Path, kind: str, tmp_path: Path
) -> None:
    recipe = recipe_of(kind)
    losses = pool.run(curve, recipe)[0]
    assert losses[0] == pytest.approx(pool.run(naive_first_loss, recipe)[0], rel=1e-5)
    assert losses[-1] < losses[0]
    elsewhere = recipe_of(kind, name="elsewhere.yaml", out=str(tmp_path / "elsewhere"))
    assert pool.run(curve, elsewhere, tp=2, pp=2)[-1] == pytest.approx(losses, rel=1e-5)
    folder = RunFolder(load_recipe(recipe).out)
    assert [row["model"] for row in read_json(folder.summary)] == ["teacher", "student", "distilled"]
    assert read_config(folder.model("export")).shape == read_config(students / kind).shape
    assert folder_hash(folder.model("distilled")) != folder_hash(students / kind)
    assert (folder.model("export") / "tokenizer.json").is_file()
    card = (folder.model("export") / "README.md").read_text()
    assert f"base_model: {kind}\n" in card and f"{kind} distilled from model" in card and "nothing was pruned" in card
    describe(folder.path)
    report_run(folder.path)


def export_newest(topology: Topology, recipe: Path, to: Path) -> None:
    hand_over(load_recipe(recipe, ["export.dtype=float32"]), topology, to, checkpoint="newest")


def test_every_verb_knows_it(pool: Pool, recipe_of: Write, students: Path, material: Path, tmp_path: Path) -> None:
    keys = tiny_recipe(material)
    distill = keys["distill"] | {"retain": True}
    recipe = recipe_of("qwen2", random_baseline=True, correct=keys["correct"], distill=distill)
    stages = ["prepare", "correct", "distill", "baseline", "evaluate", "export"]
    assert [(step.stage, step.state) for step in dry_run(load_recipe(recipe))] == [(name, "run") for name in stages]
    predicted = estimate(load_recipe(recipe))
    assert predicted.student == read_config(students / "qwen2").shape
    assert (predicted.stage_flops["score"], predicted.stage_flops["prune"]) == (0, 0)
    pool.run(curve, recipe, dp=2)
    assert {step.state for step in dry_run(load_recipe(recipe))} == {"done"}
    pool.run(export_newest, recipe, tmp_path / "newest", tp=2)
    assert folder_hash(tmp_path / "newest") == folder_hash(load_recipe(recipe).out / "distilled")
    again = dry_run(load_recipe(recipe, [f"student={students / 'nemotron'}"]))
    assert [step.state for step in again] == ["done"] * 2 + ["run"] * 4


def unlike(students: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Return a copy of the Qwen2 with another tokenizer."""
    shutil.copytree(students / "qwen2", to)
    tokenizer = json.loads((to / "tokenizer.json").read_text())
    change(tokenizer)
    (to / "tokenizer.json").write_text(json.dumps(tokenizer))
    return to


def swapped(tokenizer: dict[str, Any]) -> None:
    vocab = tokenizer["model"]["vocab"]
    vocab["w7"], vocab["w8"] = vocab["w8"], vocab["w7"]


def longer(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"]["vocab"]["more"] = SHAPE.vocab


def lower(tokenizer: dict[str, Any]) -> None:
    tokenizer["normalizer"] = {"type": "Lowercase"}


def whitespace(tokenizer: dict[str, Any]) -> None:
    tokenizer["pre_tokenizer"]["type"] = "Whitespace"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (swapped, "token 7 is 'w7' in the first, 'w8' in the second"),
        (longer, f"token {SHAPE.vocab} is None in the first, 'more' in the second"),
        (lower, "normalizer is 'None' in the first, "),
        (whitespace, "pre_tokenizer.type is 'WhitespaceSplit' in the first, 'Whitespace' in the second"),
    ],
)
def test_unlike_tokenizers_are_refused_with_the_first_difference(
    recipe_of: Write, students: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    recipe = recipe_of(str(unlike(students, tmp_path / "unlike", change)))
    with pytest.raises(DataError, match=rf"tokenizers in \S+ and \S+ differ: {message}"):
        dry_run(load_recipe(recipe))
    with pytest.raises(DataError, match="differ"):
        estimate(load_recipe(recipe))


def test_a_vocabulary_that_differs_in_more_than_padding_is_refused(
    recipe_of: Write, students: Path, tmp_path: Path
) -> None:
    make_folder(tmp_path / "short", "qwen2", vocab_size=SHAPE.vocab - 1)
    recipe = recipe_of(str(tmp_path / "short"))
    with pytest.raises(
        RecipeError,
        match=r"short has no tokenizer, so that the teacher's and the student's cannot be compared\. Put it there",
    ):
        dry_run(load_recipe(recipe))
    for file in FILES:
        shutil.copy(students / "qwen2" / file, tmp_path / "short" / file)
    with pytest.raises(
        RecipeError, match=r"has 131 vocabulary entries and the student 130, but .* has 131.*\. Give a student whose"
    ):
        dry_run(load_recipe(recipe))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prune": {"ffn": 32}}, "remove prune, or student"),
        ({"score": {"samples": 16, "depth": {"metric": "bi"}}}, "remove score.depth, or student"),
        ({"distill": {"start": "somewhere"}}, "remove distill.start, or student"),
        ({"student": None}, "prune is missing: give .* or a `student`"),
        ({"student": "no/where/at/all"}, "no/where/at/all is not a Hugging Face folder"),
    ],
)
def test_what_cannot_be_is_refused_before_work_begins(recipe_of: Write, changes: dict[str, Any], message: str) -> None:
    recipe = recipe_of("qwen2")
    tree = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({key: value for key, value in (tree | changes).items() if value is not None}))
    with pytest.raises(MinitronError, match=message):
        dry_run(load_recipe(recipe))
    assert not Path(tree["out"]).exists()


def test_a_student_of_a_shorter_context_than_the_samples_is_refused(
    recipe_of: Write, students: Path, tmp_path: Path
) -> None:
    shutil.copytree(students / "qwen2", tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8}))
    with pytest.raises(RecipeError, match="sequence is 16, but the model has a max_position_embeddings of 8"):
        dry_run(load_recipe(recipe_of(str(tmp_path / "short"))))
