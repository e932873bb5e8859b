"""Stages `score` and `prune`: the plan equals one made by calling the library directly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.convert import load_hf, model_hash
from minitron_megatron.errors import CheckpointError, RecipeError
from minitron_megatron.events import silent
from minitron_megatron.files import checksum, read_json, write_json
from minitron_megatron.parallel import Topology
from minitron_megatron.prune import choose, first_plan, random_plan, trim
from minitron_megatron.recipe import load_recipe
from minitron_megatron.records import DepthScores, Plan, Scores
from minitron_megatron.report import describe, report_run
from minitron_megatron.report.page import CAPTIONS
from minitron_megatron.run import dry_run, run
from minitron_megatron.run.context import Context
from minitron_megatron.run.stages.prune import composed
from minitron_megatron.run_folder import RunFolder
from minitron_megatron.score import score
from minitron_megatron.testing import Pool
from tests.tiny import SHAPE

Write = Callable[..., Path]
WIDTHS = {"hidden": 32, "ffn": 48, "heads": 4}
HALF_WAY = {"hidden": 40, "ffn": 56, "heads": 6}


def until_pruned(topology: Topology, recipe: Path, overrides: tuple[str, ...] = ()) -> None:
    keys = load_recipe(recipe, overrides)
    for stage in ("prepare", "score", "prune"):
        if stage != "score" or keys.prune.by == "importance":
            run(keys, topology, only=stage)


def by_hand(topology: Topology, recipe: Path) -> str:
    """Return the model's hash after two successive trims, scored on the run's samples."""
    keys = load_recipe(recipe)
    prepared = read_json(RunFolder(keys.out).record("prepare"))["result"]
    batches = Context(keys, topology, silent, {"prepare": prepared}, str).calibration_batches()
    model = load_hf(keys.model, topology)
    for sizes, layers in ((HALF_WAY, (0, 1, 3, 4)), (WIDTHS, None)):
        plan = choose(score(model, batches, topology=topology), layers=layers, **sizes)
        model = trim(model, plan, topology)
    return model_hash(model, topology)


def result(recipe: Path, stage: str) -> dict[str, Any]:
    return read_json(RunFolder(load_recipe(recipe).out).record(stage))["result"]


def folders(recipe: Path) -> RunFolder:
    return RunFolder(load_recipe(recipe).out)


@pytest.fixture
def recipe_of(recipe_file: Write) -> Callable[..., Path]:
    """Write a recipe without correction and with these `prune` keys."""

    def write(score: dict[str, Any] | None = None, **prune: Any) -> Path:
        return recipe_file(prune=prune, correct=None, score={"samples": 16, "micro_batch": 2} | (score or {}))

    return write


def test_two_iterations_are_two_cuts_by_hand(pool: Pool, recipe_of: Write) -> None:
    recipe = recipe_of(layers=[0, 1, 3, 4], iterations=2, **WIDTHS)
    pool.run(until_pruned, recipe, ("parallel.tp=2", "parallel.pp=2"), tp=2, pp=2)
    found = result(recipe, "prune")
    assert {found["hash"]} == set(pool.run(by_hand, recipe))
    assert (found["rounds"], found["layers"]) == ([HALF_WAY, WIDTHS], [0, 1, 3, 4])
    plan, scores = Plan.load(folders(recipe).plan), Scores.load(folders(recipe).scores)
    assert plan.target == SHAPE.resized(layers=4, **WIDTHS)
    assert plan.model_hash == scores.model_hash
    assert plan.keep != choose(scores, layers=[0, 1, 3, 4], **WIDTHS).keep, "the second round chose otherwise"
    describe(folders(recipe).plan)


def test_two_plans_in_one() -> None:
    """Compare with applying two cuts to lists of names."""
    first = Plan(
        SHAPE,
        {"ffn": {0: tuple(range(0, 64, 2)), 3: tuple(range(32)), 4: tuple(range(32, 64))}},
        (0, 3, 4),
        {"ffn": {0: 0.5, 3: 0.25, 4: 0.125}},
        "abc",
    )
    second = Plan(
        first.target,
        {"ffn": {0: (1, 5), 2: (0, 31)}, "hidden": {None: (3, 7)}, "heads": dict.fromkeys((0, 2), (0, 7))},
        (0, 2),
        {"ffn": {0: 0.75, 2: 0.0625}, "hidden": {None: 0.5}},
    )
    both = composed(first, second)
    assert both.layers == (0, 4)
    assert both.keep == {
        "ffn": {0: (2, 10), 4: (32, 63)},
        "hidden": {None: (3, 7)},
        "heads": dict.fromkeys((0, 4), (0, 7)),
    }
    assert both.margins == {"ffn": {0: 0.5, 4: 0.0625}, "hidden": {None: 0.5}}
    assert (both.shape, both.target, both.model_hash) == (SHAPE, second.target, "abc")
    assert composed(Plan(SHAPE), Plan(SHAPE)) == Plan(SHAPE)


def test_heads_follow_their_groups_through_two_plans() -> None:
    """Four KV groups of two heads: the first plan keeps groups 1 and 3, the second one head of each."""
    shape = replace(SHAPE, kv_groups=4)
    groups = Plan(shape, {"kv_groups": dict.fromkeys(range(5), (1, 3))})
    heads = Plan(groups.target, {"heads": dict.fromkeys(range(5), (1, 2))})
    assert composed(groups, heads).keep == groups.keep | {"heads": dict.fromkeys(range(5), (3, 6))}
    back = composed(
        Plan(shape, {"heads": dict.fromkeys(range(5), (0, 3, 5, 6))}), Plan(shape.resized(heads=4), groups.keep)
    )
    assert back.keep == groups.keep | {"heads": dict.fromkeys(range(5), (3, 6))}


def test_one_iteration_is_the_plan_of_the_scores(pool: Pool, recipe_of: Write) -> None:
    recipe = recipe_of(**WIDTHS)
    pool.run(until_pruned, recipe)
    assert Plan.load(folders(recipe).plan) == choose(Scores.load(folders(recipe).scores), **WIDTHS)
    assert result(recipe, "prune")["rounds"] == [WIDTHS]
    assert not folders(recipe).depth.exists()


def test_the_statistic_and_the_scope_reach_the_files(pool: Pool, recipe_of: Write) -> None:
    statistic = {"batch": "mean", "sequence": "l2", "neurons": "post", "heads": "norm_first"}
    recipe = recipe_of({"statistic": statistic}, scope="network", **WIDTHS)
    pool.run(until_pruned, recipe, dp=2)
    scores = Scores.load(folders(recipe).scores)
    assert vars(scores.statistic) == statistic
    assert Plan.load(folders(recipe).plan) == choose(scores, scope="network", **WIDTHS)


@pytest.mark.parametrize("by", ["random", "first"])
def test_what_needs_no_scores_makes_none(pool: Pool, recipe_of: Write, by: str) -> None:
    recipe = recipe_of(by=by, layers=[0, 1, 3, 4], **WIDTHS)
    pool.run(until_pruned, recipe, tp=2)
    plans = {
        "random": random_plan(SHAPE, load_recipe(recipe).seed, layers=(0, 1, 3, 4), **WIDTHS),
        "first": first_plan(SHAPE, layers=(0, 1, 3, 4), **WIDTHS),
    }
    assert Plan.load(folders(recipe).plan) == plans[by]
    assert not folders(recipe).scores.exists()
    with pytest.raises(RecipeError, match=r"does not use the stage score\. Its stages are prepare, prune, distill"):
        pool.run(run_only_score, recipe)


def run_only_score(topology: Topology, recipe: Path) -> None:
    run(load_recipe(recipe), topology, only="score")


@pytest.mark.parametrize("metric", ["loss", "kl", "bi"])
def test_a_number_of_layers_leaves_out_the_best_block(pool: Pool, recipe_of: Write, metric: str) -> None:
    """Layers and widths are pruned by one plan, and the report plots the measurements."""
    recipe = recipe_of({"depth": {"metric": metric, "lengths": [1]}}, layers=3, **WIDTHS)
    pool.run(until_pruned, recipe, ("parallel.tp=2", "parallel.pp=2"), tp=2, pp=2)
    depth, plan = DepthScores.load(folders(recipe).depth), Plan.load(folders(recipe).plan)
    assert (depth.metric, depth.lengths, depth.samples, depth.shape) == (metric, (1, 2), 16, SHAPE)
    best = min(range(4), key=lambda first: depth.blocks[first, 2])
    assert plan.kept_layers == tuple(layer for layer in range(5) if layer not in (best, best + 1))
    assert plan == choose(Scores.load(folders(recipe).scores), layers=plan.kept_layers, **WIDTHS)
    assert plan.target == SHAPE.resized(layers=3, **WIDTHS)
    assert escape(CAPTIONS["depth"]) in report_run(folders(recipe).path).read_text()


def test_layers_taken_one_by_one(pool: Pool, recipe_of: Write) -> None:
    recipe = recipe_of({"depth": {"greedy": True}}, layers=3, contiguous=False)
    pool.run(until_pruned, recipe)
    gone = [layer for layer, _ in DepthScores.load(folders(recipe).depth).greedy]
    assert len(gone) == 2
    assert set(Plan.load(folders(recipe).plan).kept_layers) == set(range(5)) - set(gone)


def test_layers_by_the_default_metric_even_where_the_widths_are_drawn(pool: Pool, recipe_of: Write) -> None:
    recipe = recipe_of(layers=4, by="random", ffn=48)
    pool.run(until_pruned, recipe, ("prune.by=importance",))
    kept = Plan.load(folders(recipe).plan).kept_layers
    pool.run(run_only_score, recipe)
    assert [step.state for step in dry_run(load_recipe(recipe))[:3]] == ["done", "done", "run"]
    pool.run(until_pruned, recipe)
    assert Plan.load(folders(recipe).plan) == random_plan(SHAPE, load_recipe(recipe).seed, layers=kept, ffn=48)
    assert DepthScores.load(folders(recipe).depth).metric == "loss"


def test_another_number_of_layers_measures_again_and_a_list_does_not(pool: Pool, recipe_of: Write) -> None:
    recipe = recipe_of(layers=[0, 1, 2], ffn=48)
    pool.run(until_pruned, recipe)

    def would_run(*overrides: str) -> list[str]:
        return [step.stage for step in dry_run(load_recipe(recipe, overrides)) if step.state != "done"]

    assert would_run("prune.layers=[0, 1, 3]")[0] == "prune"
    assert would_run("prune.contiguous=false")[0] == "prune"
    assert would_run("prune.layers=3")[0] == "score"
    pool.run(until_pruned, recipe, ("prune.layers=3",))
    assert would_run("prune.layers=3", "prune.ffn=32")[0] == "prune"
    assert would_run("prune.layers=2")[0] == "score"
    pool.run(until_pruned, recipe)
    assert not folders(recipe).depth.exists(), "what was measured for another recipe is gone"


@pytest.mark.parametrize("name", ["scores", "depth"])
def test_scores_of_another_model_are_refused(pool: Pool, recipe_of: Write, name: str) -> None:
    recipe = recipe_of(layers=4, ffn=48)
    for stage in ("prepare", "score"):
        pool.run(run_stage, recipe, stage)
    path = getattr(folders(recipe), name)
    kind = Scores if name == "scores" else DepthScores
    replace(kind.load(path), model_hash="0" * 64).save(path)  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=rf"{path.name} has changed since .* Remove .*scores and run"):
        pool.run(run_stage, recipe, "prune", tp=2)
    record = folders(recipe).record("score")
    kept = read_json(record)
    kept["result"]["files"][path.name] = checksum(path)
    write_json(record, kept)
    with pytest.raises(CheckpointError, match=rf"{path.name} was measured on a model other .* Remove .*scores and"):
        pool.run(run_stage, recipe, "prune", tp=2)


def run_stage(topology: Topology, recipe: Path, stage: str) -> None:
    run(load_recipe(recipe), topology, only=stage)
