"""The refit inside a run: its models, what is said of it, and what it costs by the estimate."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.convert import load_hf, model_hash
from minitron_megatron.errors import RecipeError
from minitron_megatron.events import Event, silent
from minitron_megatron.files import read_json
from minitron_megatron.forecast import estimate
from minitron_megatron.forecast.memory import model_bytes
from minitron_megatron.forecast.refit_cost import refit_bytes, refit_cost, refit_flops, shared_flops
from minitron_megatron.forecast.sizes import sizes_of
from minitron_megatron.layout import Shape, flops_per_token
from minitron_megatron.parallel import Topology
from minitron_megatron.prune import choose, trim
from minitron_megatron.recipe import load_recipe
from minitron_megatron.records import Plan, Scores
from minitron_megatron.refit import MOMENT_ROWS, refit
from minitron_megatron.report import report_run
from minitron_megatron.run import dry_run, run
from minitron_megatron.run.context import Context
from minitron_megatron.run_folder import RunFolder
from minitron_megatron.testing import Pool
from minitron_megatron.train import LMObjective, mean_loss
from tests.run.test_run import copy_until, in_a_process, record_of
from tests.tiny import SHAPE

PRUNE = {"hidden": 32, "ffn": 48, "layers": [0, 1, 3, 4], "refit": "sequential", "refit_samples": 48}
SEARCH = {"ffn": [40, 48], "budget": {"params": 90_000}, "light": None}
Write = Callable[..., Path]


def whole_run(topology: Topology, recipe: Path) -> list[str]:
    events: list[Event] = []
    run(load_recipe(recipe), topology, listener=events.append)
    return [event.label for event in events]


def by_hand(topology: Topology, recipe: Path) -> tuple[str, str]:
    """The hashes of the model that the recipe's plan leaves, before and after the library's refit."""
    keys = load_recipe(recipe)
    prepared = read_json(RunFolder(keys.out).record("prepare"))["result"]
    batches = Context(keys, topology, silent, {"prepare": prepared}, str).calibration_batches(48)
    plan = Plan.load(RunFolder(keys.out).plan)
    student = trim(load_hf(keys.model, topology), plan, topology)
    trimmed = model_hash(student, topology)
    refit(student, load_hf(keys.model, topology), plan, batches, topology, method="sequential")
    return trimmed, model_hash(student, topology)


def test_a_run_distils_the_refitted_model(pool: Pool, recipe_file: Write) -> None:
    recipe = recipe_file(prune=PRUNE, correct=None, random_baseline=False)
    out = RunFolder(load_recipe(recipe).out)
    assert "refit" in pool.run(whole_run, recipe)[0]
    rows = {row["model"]: row["loss_nats_per_token"] for row in read_json(out.summary)}
    assert list(rows) == ["teacher", "pruned", "refitted", "distilled"]
    assert len(set(rows.values())) == 4, "each row measures a model of its own"
    trimmed, refitted = pool.run(by_hand, recipe)[0]
    done = read_json(out.record("prune"))["result"]
    assert (done["hash"], done["refit"]["method"]) == (refitted, "sequential")
    assert trimmed != refitted
    fits = read_json(out.refit)
    assert len(fits) == done["refit"]["layers"] == 4 * 4 + 1
    assert sum(fit["ridge"] is not None for fit in fits) == done["refit"]["repaired"] > 8
    page = report_run(out.path).read_text()
    assert "<h2>Refit</h2>" in page and "layers.0.self_attention.linear_qkv" in page
    card = (out.model("export") / "README.md").read_text()
    assert f"{done['refit']['repaired']} of 17 linear layers" in card and "(sequential)" in card

    def would_run(*overrides: str) -> list[str]:
        return [step.stage for step in dry_run(load_recipe(recipe, overrides)) if step.state != "done"]

    assert would_run() == []
    assert would_run("prune.refit_samples=32")[0] == would_run("prune.refit=none")[0] == "prune"

    killed = recipe_file("killed.yaml", prune=PRUNE, correct=None, random_baseline=False, out=str(out.path) + "-killed")
    copy_until(recipe, killed, "prune")
    assert in_a_process(killed, ("prune", "refit", 2)) == -signal.SIGKILL
    assert not RunFolder(load_recipe(killed).out).record("prune").exists()
    assert in_a_process(killed, until="prune") == 0
    assert record_of(killed, "prune")["result"]["hash"] == refitted


def until_searched(topology: Topology, recipe: Path) -> float:
    """Searches; the loss on the calibration samples of the narrower candidate, cut and refitted by hand."""
    keys = load_recipe(recipe)
    for stage in ("prepare", "score", "search"):
        run(keys, topology, only=stage)
    done = {name: read_json(RunFolder(keys.out).record(name))["result"] for name in ("prepare", "score")}
    context = Context(keys, topology, silent, done, str)
    batches, teacher = context.calibration_batches(), load_hf(keys.model, topology)
    plan = choose(Scores.load(RunFolder(keys.out).scores), ffn=40)
    student = trim(load_hf(keys.model, topology), plan, topology)
    refit(student, teacher, plan, context.calibration_batches(24), topology, method="outputs")
    return mean_loss(student, batches, LMObjective(topology), topology)[0]


def test_a_search_compares_refitted_candidates(pool: Pool, recipe_file: Write) -> None:
    prune = {"refit": "outputs", "refit_samples": 24}
    recipe = recipe_file(prune=prune, search=SEARCH, correct=None, random_baseline=False)
    want = pool.run(until_searched, recipe, dp=2)[0]
    rows = read_json(RunFolder(load_recipe(recipe).out).search_table)["candidates"]
    found = {row["sizes"]["ffn"]: row["after_cut"] for row in rows}
    assert found[40] == pytest.approx(want, abs=1e-5)
    assert estimate(load_recipe(recipe)).stage_flops["prune"] > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prune": PRUNE | {"refit_samples": 47}}, r"prune\.refit_samples is 47, which cannot be split"),
        ({"prune": PRUNE | {"heads": 4, "merge": "q"}}, r"would undo prune\.merge"),
    ],
)
def test_what_cannot_be_refitted_is_refused(recipe_file: Write, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        dry_run(load_recipe(recipe_file(correct=None, **changes)))


def test_an_estimate_counts_a_refit(recipe_file: Write) -> None:
    keys = ["prune.refit_samples=48", "correct=null"]
    plain, repaired = (
        estimate(load_recipe(recipe_file(prune=PRUNE), [*keys, f"prune.refit={method}"]))
        for method in ("none", "sequential")
    )
    assert plain.refit_bytes == plain.stage_flops["prune"] == 0 and "memory per rank, refit" not in plain.rows()
    assert repaired.flops - plain.flops == repaired.stage_flops["prune"] > 0 and repaired.hours > plain.hours
    recipe = load_recipe(recipe_file(prune=PRUNE), keys)
    student = repaired.student
    assert student == SHAPE.resized(hidden=32, ffn=48, layers=4)
    doubled = load_recipe(recipe_file(prune=PRUNE), ["prune.refit_samples=96", "correct=null"])
    one, two = (refit_flops(each, SHAPE, student) for each in (recipe, doubled))
    assert two[0] == 2 * one[0]
    moments = sum(copies * 48 * 16 * size * (size + MOMENT_ROWS) for copies, size in _moments(student))
    assert two[1] - one[1] == moments
    assert repaired.refit_bytes == refit_bytes(recipe, SHAPE, student)
    assert json.dumps(repaired.predictions())


def _moments(student: Shape) -> list[tuple[int, int]]:
    """(layers, size of the vectors whose moments are taken)."""
    attention, both = student.heads * student.head_dim, SHAPE.hidden + student.hidden
    return [(4, attention + 32), (4, student.ffn + 32), (4, both), (4, both), (1, both)]


def test_an_estimate_counts_what_candidates_share_once(recipe_file: Write) -> None:
    prune = {"refit": "outputs", "refit_samples": 48}
    recipe = load_recipe(recipe_file(prune=prune, search=SEARCH | {"heads": [4, 8]}, correct=None))
    tokens, solves = 48 * 16, lambda size: 5 * 7 * (size**3 // 3 + 4 * 48 * size**2)
    assert refit_flops(recipe, SHAPE, SHAPE.resized(ffn=40), ("fc2",)) == (0, pytest.approx(solves(40), abs=50))
    assert refit_flops(recipe, SHAPE, SHAPE.resized(layers=4), ("fc2",)) == (0, 0)
    assert shared_flops(recipe, SHAPE, ("proj", "fc2")) == (
        flops_per_token(SHAPE, 16) * tokens,
        2 * 5 * tokens * 64 * (64 + MOMENT_ROWS),
    )
    heads = SHAPE.resized(heads=4)
    alone, spared = (refit_flops(recipe, SHAPE, heads, shared) for shared in ((), ("proj",)))
    assert alone[0] - spared[0] > flops_per_token(heads, 16) * tokens / 5
    assert alone[1] - spared[1] == 5 * tokens * (32 + 48) * (32 + 48 + MOMENT_ROWS)
    cost = refit_cost(recipe, sizes_of(recipe, SHAPE), 2)
    assert cost.host_bytes == 5 * 2 * 2 * 8 * 64**2 // 2 + 2 * tokens // 2 * 48 * 4
    wide, cut = SHAPE.resized(ffn=4096), SHAPE.resized(ffn=3584)
    weights = max(
        map(
            sum,
            zip(*(model_bytes(each, Topology.of(recipe.parallel), recipe.dtype) for each in (wide, cut)), strict=True),
        )
    )
    given = 16 * (4096**2 + 4096 * 3584 + 2 * 3584**2) + 7 * 8 * 48 * 3584
    assert refit_bytes(recipe, wide, cut, ("fc2",)) == weights + given > refit_bytes(recipe, wide, cut)
