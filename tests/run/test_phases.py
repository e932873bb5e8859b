"""Recipes with distillation in phases and with continuous correction of the teacher."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.errors import DataError, RecipeError
from minitron_megatron.events import Event
from minitron_megatron.files import read_json
from minitron_megatron.forecast import estimate
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe
from minitron_megatron.recipe.phases import resolved
from minitron_megatron.run import STAGES, run
from minitron_megatron.testing import Pool

Write = Callable[..., Path]

SECOND = {"tokens": 6 * 4 * 32, "sequence": 32, "global_batch": 4, "lr": 1e-3}


def work(topology: Topology, recipe: Path, overrides: tuple[str, ...] = ()) -> list[tuple[str, int, int, dict]]:
    """Run a recipe; return (label, step, number of steps, values) of each training step."""
    said: list[tuple[str, int, int, dict]] = []

    def listen(event: Event) -> None:
        if event.unit == "steps":
            said.append((event.label, event.done, event.total or 0, dict(event.values)))

    run(load_recipe(recipe, overrides), topology, listener=listen)
    return said


def phased(recipe_file: Write, *phases: dict[str, Any], **distill: Any) -> Path:
    keys = {"tokens": 6 * 8 * 16, "global_batch": 8, "micro_batch": 2, "warmup_steps": 2, "lr": 5e-3, "save_every": 4}
    return recipe_file(correct=None, random_baseline=False, distill=keys | {"phases": list(phases)} | distill)


def test_what_a_phase_leaves_out_is_as_before(recipe_file: Write) -> None:
    recipe = load_recipe(phased(recipe_file, SECOND, {"tokens": 4 * 4 * 32, "weights": [2.0]}))
    first, second, third = resolved(recipe.distill, recipe.data)
    assert [phase.sequence for phase in (first, second, third)] == [16, 32, 32]
    assert [phase.keys.lr for phase in (first, second, third)] == [5e-3, 1e-3, 1e-3]
    assert [phase.steps for phase in (first, second, third)] == [6, 6, 4]
    assert third.weights == (2.0,) and third.keys.warmup_steps == 2
    assert estimate(recipe).distill_tokens == first.tokens + second.tokens + third.tokens


def test_phases_follow_each_other_and_one_more_continues(recipe_file: Write, pool: Pool) -> None:
    recipe = phased(recipe_file, SECOND, retain=True)
    said = pool.run(work, recipe, dp=2)[0]
    assert [(step, total) for _, step, total, _ in said] == [(step, 12) for step in range(1, 13)]
    assert said[-1][3]["tokens"] == said[5][3]["tokens"] + 6 * 4 * 32
    peaks = [max(values["lr"] for _, step, _, values in said if (step > 6) == later) for later in (False, True)]
    assert peaks == pytest.approx([5e-3, 1e-3])
    assert all("validation_kl" in values for _, step, _, values in said if step in (6, 12))
    third = phased(recipe_file, SECOND, {"tokens": 3 * 4 * 32}, retain=True)
    more = pool.run(work, third, dp=2)[0]
    assert [(step, total) for _, step, total, _ in more] == [(step, 15) for step in range(13, 16)]
    assert more[-1][3]["tokens"] == said[-1][3]["tokens"] + 3 * 4 * 32


def test_a_corpus_is_read_again_only_where_the_recipe_says_so(recipe_file: Write, pool: Pool) -> None:
    recipe = phased(recipe_file, tokens=20 * 8 * 16, validate_every=20, save_every=20)
    with pytest.raises(DataError, match=r"160 samples .* set data\.repeat to true"):
        pool.run(work, recipe)
    assert len(pool.run(work, recipe, ("data.repeat=true",))[0]) == 20


def test_checkpoints_go_where_they_are_not_retained(recipe_file: Write, pool: Pool) -> None:
    recipe = phased(recipe_file, SECOND)
    pool.run(work, recipe)
    assert not list((load_recipe(recipe).out / "checkpoints").glob("*"))


@pytest.mark.parametrize(
    ("phase", "says"),
    [
        ({"tokens": 100, "global_batch": 3}, r"distill\.phases\.0\.global_batch is 3, which cannot be split"),
        ({"tokens": 100, "weights": [1.0, 2.0]}, r"weights has 2 entries, but data\.sources has 1\. Give one"),
        ({"tokens": 100, "sequense": 8}, r"sequense is not a known key\. Did you mean 'sequence'"),
    ],
)
def test_a_phase_that_cannot_be_is_one_message(recipe_file: Write, pool: Pool, phase: dict, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        pool.run(work, phased(recipe_file, phase))


CORRECT = {"tokens": 1, "lr": 1e-3, "warmup_steps": 2, "continuous": True}


def test_a_teacher_is_corrected_meanwhile(recipe_file: Write, pool: Pool) -> None:
    recipe = phased(recipe_file, SECOND, retain=False)
    keys = (f"correct={json.dumps(CORRECT)}",)
    said = {
        name: pool.run(work, recipe, (*keys, f"out={recipe.parent / name}"), **layout)[0]
        for name, layout in (("alone", {}), ("dp2", {"dp": 2}))
    }
    alone, spread = ([values["loss"] for *_, values in said[name]] for name in ("alone", "dp2"))
    assert len(alone) == 12 and alone == pytest.approx(spread, rel=1e-4)
    frozen = [values["loss"] for *_, values in pool.run(work, recipe, (f"out={recipe.parent / 'frozen'}",))[0]]
    assert frozen[0] == alone[0] and frozen[-1] != pytest.approx(alone[-1], rel=1e-3)
    out = recipe.parent / "alone"
    assert {path.stem for path in (out / "stages").iterdir()} == set(STAGES) - {
        "calibrate",
        "correct",
        "search",
        "baseline",
    }
    assert [row["model"] for row in read_json(out / "summary.json")] == ["teacher", "pruned", "distilled"]


def test_norms_alone_can_be_corrected_meanwhile(recipe_file: Write, pool: Pool) -> None:
    recipe, last = phased(recipe_file), {}
    for parameters in ("all", "norms"):
        correct = json.dumps(CORRECT | {"parameters": parameters})
        said = pool.run(work, recipe, (f"correct={correct}", f"out={recipe.parent / parameters}"))[0]
        last[parameters] = [values["loss"] for *_, values in said]
    assert last["all"][0] == last["norms"][0]
    assert all(a != b for a, b in zip(last["all"][1:], last["norms"][1:], strict=True))


@pytest.mark.parametrize("key", [{"offload_teacher": True}, {"teacher_window": 1}, {"teacher_dtype": "float8"}])
def test_what_corrects_meanwhile_is_no_frozen_teacher(recipe_file: Write, key: dict) -> None:
    recipe = phased(recipe_file, **key)
    with pytest.raises(RecipeError, match=f"trains the teacher, so distill.{next(iter(key))} cannot apply: remove it"):
        load_recipe(recipe, [f"correct={json.dumps(CORRECT)}"])
