"""Runs on sources of unlike formats give the models of the same text."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe
from minitron_megatron.run import dry_run, run
from minitron_megatron.testing import Pool

Write = Callable[..., Path]


def work(topology: Topology, recipe: Path) -> dict[str, str]:
    done = run(load_recipe(recipe), topology)
    return {name: done[name]["hash"] for name in ("prune", "distill")}


def built(prefix: Path, lines: list[str]) -> Path:
    """Write the documents of .jsonl lines of words w1, w2, ... as a pair, with megatron-core's own builder."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.uint16)
    for line in lines:
        builder.add_item(torch.tensor([*(int(word[1:]) for word in json.loads(line)["text"].split()), 0]))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix


def test_a_tokenized_corpus_gives_the_models_of_its_text(
    recipe_file: Write, material: Path, tmp_path: Path, pool: Pool
) -> None:
    lines = (material / "corpus.jsonl").read_text().splitlines(keepends=True)
    parts = {"train": lines[:48], "valid": lines[48:]}
    for name, part in parts.items():
        (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress("".join(part).encode()))
        built(tmp_path / name, part)
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
