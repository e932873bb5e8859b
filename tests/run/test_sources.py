"""Runs on sources of unlike formats give the models of the same text."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

from minitron_megatron.forecast import needed_tokens
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe
from minitron_megatron.run import dry_run, run
from minitron_megatron.testing import Pool
from tests.formats import token_pair

Write = Callable[..., Path]


def work(topology: Topology, recipe: Path) -> dict[str, str]:
    done = run(load_recipe(recipe), topology)
    return {name: done[name]["hash"] for name in ("prune", "distill")}


def prepared(topology: Topology, recipe: Path, overrides: tuple[str, ...]) -> dict[str, dict]:
    return run(load_recipe(recipe, overrides), topology, only="prepare")["prepare"]["sources"]


def test_a_tokenized_corpus_gives_the_models_of_its_text(
    recipe_file: Write, material: Path, tmp_path: Path, pool: Pool
) -> None:
    lines = (material / "corpus.jsonl").read_text().splitlines(keepends=True)
    parts = {"train": lines[:48], "valid": lines[48:]}
    for name, part in parts.items():
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress("".join(part).encode()))
        token_pair(tmp_path / name, [json.loads(line)["text"] for line in part])
    made = {}
    for kind in (".jsonl.gz", ""):
        train, valid = (str(tmp_path / f"{name}{kind}") for name in parts)
        data = {"sequence": 16, "sources": [{"path": [train] if kind else train, "validation": valid}]}
        out = tmp_path / f"run{kind}"
        recipe = recipe_file(f"{kind}.yaml", data=data, correct=None, random_baseline=False, out=str(out))
        made[kind] = pool.run(work, recipe, dp=2)[0]
        assert all(step.state == "done" for step in dry_run(load_recipe(recipe)))
    assert made[""] == made[".jsonl.gz"]
    assert not list((tmp_path / "run" / "data").glob("*.bin"))


def test_only_the_text_that_budgets_need_is_tokenized(recipe_file: Write, tmp_path: Path, pool: Pool) -> None:
    recipe = recipe_file(correct=None, random_baseline=False)
    few = ("data.tokenize=needed", "distill.tokens=128", "distill.warmup_steps=0", "evaluate.samples=8")
    assert needed_tokens(load_recipe(recipe)) is None
    assert needed_tokens(load_recipe(recipe, few)) == [{"train": 1 + 128 + 16 * 16, "valid": 8 * 16 + 1}]
    first = pool.run(prepared, recipe, few, dp=2)[0]["0-corpus"]
    more = pool.run(prepared, recipe, (*few, "distill.tokens=1280"), dp=2)[0]["0-corpus"]
    assert 1 + 128 + 16 * 16 <= first["tokens"] < more["tokens"] and first["validation_tokens"] > 8 * 16
    assert dry_run(load_recipe(recipe, (*few, "distill.tokens=1280")))[0].state == "done"
    every = pool.run(prepared, recipe, few[1:], dp=2)[0]["0-corpus"]
    assert more["tokens"] < every["tokens"] and more["content"] != every["content"]
