"""With `score.sources` a run is scored on that text, and distilled on its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_megatron.errors import DataError, MinitronError
from minitron_megatron.events import silent
from minitron_megatron.files import read_json
from minitron_megatron.forecast import needed_calibration, needed_tokens
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe
from minitron_megatron.records import DepthScores, Scores
from minitron_megatron.run import dry_run, run
from minitron_megatron.run.context import Context
from minitron_megatron.run_folder import RunFolder
from minitron_megatron.testing import Pool
from tests.tiny import SHAPE

Write = Callable[..., Path]
SCORE = {"samples": 16, "micro_batch": 2, "depth": {"metric": "loss", "lengths": [1]}}


@pytest.fixture
def chat(tmp_path: Path) -> Path:
    """File of other text than the corpus."""
    path = tmp_path / "chat.jsonl"
    lines = [" ".join(f"w{1 + (11 * i + j * j) % (SHAPE.vocab - 1)}" for j in range(40)) for i in range(40)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


@pytest.fixture
def recipe_of(recipe_file: Write) -> Write:
    def write(**changes: Any) -> Path:
        return recipe_file(**{"correct": None, "random_baseline": False, "score": SCORE} | changes)

    return write


def until_scored(topology: Topology, recipe: Path, *overrides: str) -> None:
    keys = load_recipe(recipe, overrides)
    for stage in ("prepare", *(["calibrate"] if keys.score.sources else []), "score"):
        run(keys, topology, only=stage)


def samples_of(topology: Topology, recipe: Path) -> list[torch.Tensor]:
    """Return all calibration samples, as FP8 calibration and scoring draw them."""
    keys = load_recipe(recipe)
    folder = RunFolder(keys.out)
    done = {path.stem: read_json(path)["result"] for path in folder.record_paths()}
    corpus = Context(keys, topology, silent, done, str).calibration()
    return [corpus[number][0] for number in range(len(corpus))]


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}, {"dp": 2}])
def test_scores_are_those_of_a_run_on_that_text_alone(
    pool: Pool, recipe_of: Write, chat: Path, material: Path, tmp_path: Path, layout: dict[str, int]
) -> None:
    own = recipe_of(score=SCORE | {"sources": [{"path": str(chat)}]})
    alone = {"path": str(chat), "validation": str(material / "corpus.jsonl")}
    other = recipe_of(name="alone.yaml", out=str(tmp_path / "alone"), data={"sequence": 16, "sources": [alone]})
    plain = recipe_of(name="plain.yaml", out=str(tmp_path / "plain"))
    pool.run(until_scored, own, **layout)
    pool.run(until_scored, other)
    pool.run(until_scored, plain)
    ours, truth, differs = (RunFolder(load_recipe(each).out) for each in (own, other, plain))
    found, wanted, unlike = (Scores.load(folder.scores) for folder in (ours, truth, differs))
    for axis, by in wanted.values.items():
        for layer, values in by.items():
            torch.testing.assert_close(found.values[axis][layer], values, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(unlike.values["ffn"][0], wanted.values["ffn"][0], rtol=1e-3)
    depths = [DepthScores.load(folder.depth).of_length(1) for folder in (ours, truth)]
    assert depths[0] == pytest.approx(depths[1], rel=1e-5)
    drawn, expected = pool.run(samples_of, own)[0], pool.run(samples_of, other)[0]
    assert all(map(torch.equal, drawn, expected)) and len(drawn) == len(expected) == SCORE["samples"]


def test_a_blend_is_drawn_by_weight_and_only_what_depends_on_it_runs_again(
    pool: Pool, recipe_of: Write, chat: Path, material: Path
) -> None:
    blend = [{"path": str(material / "corpus.jsonl"), "weight": 3}, {"path": str(chat)}]
    recipe = recipe_of(score=SCORE | {"sources": blend, "depth": None})
    names = ["prepare", "calibrate", "score", "prune", "distill", "evaluate", "export"]
    assert [step.stage for step in dry_run(load_recipe(recipe))] == names
    pool.run(finish, recipe, dp=2)
    assert {step.state for step in dry_run(load_recipe(recipe))} == {"done"}
    assert sum(map(is_chat, pool.run(samples_of, recipe)[0])) == SCORE["samples"] // 4
    heavier = dry_run(load_recipe(recipe, [f"score.sources=[{{path: {chat}}}]"]))
    assert [step.state for step in heavier] == ["done"] + ["run"] * 6
    assert heavier[1].why == "its inputs changed"
    plain = dry_run(load_recipe(recipe, ["score.sources=[]"]))
    assert [(step.stage, step.state) for step in plain][:2] == [("prepare", "done"), ("score", "run")]


def finish(topology: Topology, recipe: Path) -> None:
    run(load_recipe(recipe), topology)


def is_chat(sample: torch.Tensor) -> bool:
    """Return whether a sample is of the second source, whose words w(1 + 11 i + j j) have second differences of 2."""
    steps = (sample[1:] - sample[:-1]) % (SHAPE.vocab - 1)
    second = (steps[1:] - steps[:-1]) % (SHAPE.vocab - 1)
    return bool((second == 2).sum() > len(second) // 2)


def test_only_the_calibration_text_that_is_needed_is_tokenized(recipe_of: Write, chat: Path) -> None:
    recipe = load_recipe(
        recipe_of(score=SCORE | {"sources": [{"path": str(chat)}]}),
        ["data.tokenize=needed", "distill.tokens=128", "distill.warmup_steps=0", "evaluate.samples=8"],
    )
    assert needed_calibration(recipe) == [{"train": 1 + 16 * 16}]
    assert needed_tokens(recipe) == [{"train": 1 + 128, "valid": 8 * 16 + 1}], "the corpus is no longer scored on"


@pytest.mark.parametrize(
    ("sources", "more", "message"),
    [
        ("[{path: no/such.jsonl}]", (), "no/such.jsonl"),
        ("[{path: CHAT}]", ("score.samples=10000",), "score.samples needs .* from chat"),
        (
            "[{path: CHAT}]",
            ("data.sources=[{path: CORPUS, validation: CHAT}]",),
            "both training text and held-out text",
        ),
        ("[{path: CHAT, validation: 0.1}]", (), "score.sources.0.validation is not a known key"),
        ("[{path: OUT/chat.jsonl}]", (), "score.sources.* is inside the run folder"),
    ],
)
def test_what_cannot_be_is_refused_before_work_begins(
    recipe_of: Write, chat: Path, material: Path, sources: str, more: tuple[str, ...], message: str
) -> None:
    recipe = recipe_of()
    out = load_recipe(recipe).out
    if "OUT" in sources:
        out.mkdir()
        shutil.copy(chat, out / "chat.jsonl")
    places = {"CHAT": str(chat), "CORPUS": str(material / "corpus.jsonl"), "OUT": str(out)}
    keys = [f"score.sources={sources}", *more]
    for name, place in places.items():
        keys = [key.replace(name, place) for key in keys]
    with pytest.raises(MinitronError, match=message):
        dry_run(load_recipe(recipe, keys))
    assert not RunFolder(out).records.exists()


def test_too_few_tokens_are_said_when_they_are_counted(pool: Pool, recipe_of: Write, tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"text": ("w1" + " " * 40) * 10}) + "\n")
    recipe = recipe_of(score={"samples": 16, "micro_batch": 2, "sources": [{"path": str(long)}]})
    with pytest.raises(DataError, match=r"score\.samples needs 16 samples of 16 tokens from 0-long, but it has only 0"):
        pool.run(finish, recipe)
    with pytest.raises(DataError, match=r"from 0-long"):
        dry_run(load_recipe(recipe))
