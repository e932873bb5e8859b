"""An MoE model runs through every stage, and the pruned model does not depend on expert parallelism."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.convert import folder_hash, read_config
from minitron_megatron.errors import RecipeError
from minitron_megatron.files import read_json
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe
from minitron_megatron.report import describe, report_run
from minitron_megatron.run import run
from minitron_megatron.run_folder import RunFolder
from minitron_megatron.testing import Pool
from tests.convert.conftest import make_folder
from tests.tiny import SHAPE

Write = Callable[..., Path]
PRUNE = {"hidden": 32, "kv_groups": 2, "heads": 2, "experts": 4, "expert_ffn": 16, "shared_ffn": 8, "layers": [0, 2]}
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "ep2": {"ep": 2, "dp": 2},
    "ep2-tp2": {"ep": 2, "tp": 2, "sequence_parallel": True},
}


@pytest.fixture(scope="module")
def model(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture") / "model"
    make_folder(folder, "qwen2_moe", vocab_size=SHAPE.vocab, hidden_size=48, num_attention_heads=4, num_experts=8)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(material / "model" / name, folder / name)
    return folder


def whole_run(topology: Topology, recipe: Path, overrides: list[str]) -> None:
    run(load_recipe(recipe, overrides), topology)


def test_every_stage_and_the_same_cut_at_every_layout(
    pool: Pool, recipe_file: Write, model: Path, tmp_path: Path
) -> None:
    recipe, pruned, losses = recipe_file(model=str(model), prune=PRUNE, correct=None, random_baseline=None), set(), []
    for name, layout in LAYOUTS.items():
        out = tmp_path / name
        parallel = {key: layout.get(key, 1) for key in ("tp", "ep")}
        overrides = [f"out={out}", *(f"parallel.{key}={size}" for key, size in parallel.items())]
        pool.run(whole_run, recipe, [*overrides, f"parallel.sequence_parallel={parallel['tp'] > 1}"], **layout)
        pruned.add(folder_hash(out / "pruned"))
        shape = read_config(out / "export").shape
        assert {axis: shape.axis_size(axis) for axis in PRUNE if axis != "layers"} | {"layers": [0, 2]} == PRUNE
        losses.append({row["model"]: row["loss_nats_per_token"] for row in read_json(out / "summary.json")})
        assert losses[-1]["distilled"] < losses[-1]["pruned"]
    assert len(pruned) == 1
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-4)
    report_run(tmp_path / "ep2")
    assert describe(RunFolder(tmp_path / "ep2").scores)


def test_merged_heads_are_in_the_pruned_model(pool: Pool, recipe_file: Write, tmp_path: Path) -> None:
    hashes = set()
    for merge in ("none", "q", "q+o"):
        keys = {"hidden": 32, "heads": 4, "merge": merge}
        recipe = recipe_file(prune=keys, correct=None, out=str(tmp_path / merge))
        for stage in ("prepare", "score", "prune"):
            pool.run(one_stage, recipe, stage, tp=1)
        hashes.add(folder_hash(tmp_path / merge / "pruned"))
    assert len(hashes) == 3


def one_stage(topology: Topology, recipe: Path, stage: str) -> None:
    run(load_recipe(recipe), topology, only=stage)


def test_a_merge_without_scores_is_refused(pool: Pool, recipe_file: Write) -> None:
    recipe = recipe_file(prune={"heads": 4, "merge": "q", "by": "first"}, correct=None)
    with pytest.raises(
        RecipeError, match=r"prune\.merge needs scores, but prune\.by: first has none\. Set merge to none"
    ):
        pool.run(one_stage, recipe, "prepare")
