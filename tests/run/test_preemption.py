"""Preemption outside of training: the run ends at once, keeps finished work, and does not requeue without progress."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from minitron_megatron.errors import Preempted, RecipeError
from minitron_megatron.events import Event
from minitron_megatron.files import read_json
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe
from minitron_megatron.run import dry_run, run
from minitron_megatron.testing import Pool
from tests.run.test_search import KEYS

Write = Callable[..., Path]
LAYOUTS = [{}, {"tp": 2}]
IDS = ["alone", "tp2"]


def signalled(topology: Topology, recipe: Path, label: str, at: int, number: int = signal.SIGUSR1) -> list[str]:
    """Send every rank a signal at its `at`-th event named `label`; return how the run ends, and its message."""
    seen: list[int] = []

    def listen(event: Event) -> None:
        if event.label == label:
            seen.append(event.done)
            if len(seen) == at:
                os.kill(os.getpid(), number)

    try:
        run(load_recipe(recipe), topology, listener=listen)
    except (Preempted, RecipeError) as error:
        assert signal.getsignal(number) is signal.SIG_DFL
        return [type(error).__name__, str(error)]
    return ["done", ""]


def done(recipe: Path) -> list[str]:
    return sorted(path.stem for path in (load_recipe(recipe).out / "stages").glob("*.json"))


@pytest.mark.parametrize("layout", LAYOUTS, ids=IDS)
def test_what_is_done_stays_and_the_next_run_goes_on(pool: Pool, recipe_file: Write, layout: dict[str, int]) -> None:
    recipe = recipe_file(random_baseline=False)
    ends = pool.run(signalled, recipe, "score", 1, **layout)
    assert ends == [["Preempted", ""]] * len(ends)
    assert done(recipe) == ["correct", "prepare"]
    ends = pool.run(signalled, recipe, "evaluate", 3, signal.SIGTERM, **layout)
    assert ends == [["Preempted", ""]] * len(ends)
    assert done(recipe) == ["correct", "distill", "prepare", "prune", "score"]
    assert {end for end, _ in pool.run(signalled, recipe, "none", 1, **layout)} == {"done"}


def test_a_stage_that_would_never_end_is_an_error(pool: Pool, recipe_file: Write) -> None:
    recipe = recipe_file(random_baseline=False)
    assert pool.run(signalled, recipe, "score", 1) == [["Preempted", ""]]
    ((kind, said),) = pool.run(signalled, recipe, "score", 1)
    assert pool.run(signalled, recipe, "score", 1, signal.SIGTERM) == [["Preempted", ""]]  # no matter of time
    assert kind == "RecipeError" and "before the stage score was done" in said and "more time" in said
    assert done(recipe) == ["correct", "prepare"]


def test_a_model_that_is_measured_is_not_measured_again(pool: Pool, recipe_file: Write) -> None:
    recipe = recipe_file(random_baseline=False)
    pool.run(signalled, recipe, "evaluate", 2)
    parts = load_recipe(recipe).out / "evaluation" / "parts"
    (kept,) = parts.iterdir()
    assert sorted(path.stem for path in kept.iterdir()) == ["corrected_teacher", "teacher"]
    assert "evaluate: from what it saved" in {f"{step.stage}: {step.why}" for step in dry_run(load_recipe(recipe))}
    path = kept / "teacher.json"
    path.write_text(path.read_text().replace('"parameters": ', '"parameters": 1'))  # shows that the part was read
    pool.run(signalled, recipe, "none", 1)
    rows = read_json(load_recipe(recipe).out / "summary.json")
    assert [str(row["parameters"])[0] == "1" for row in rows[:2]] == [True, False]
    assert not parts.exists()


def test_a_training_that_ends_at_the_signal_is_not_done_again(pool: Pool, recipe_file: Write) -> None:
    recipe = recipe_file(random_baseline=False)
    assert pool.run(signalled, recipe, "correct", 6) == [["Preempted", ""]]  # the last of 6 steps
    assert done(recipe) == ["prepare"]
    assert pool.run(signalled, recipe, "correct", 1) == [["done", ""]]  # without one


def test_a_search_goes_on_with_what_is_measured(pool: Pool, recipe_file: Write) -> None:
    recipe = recipe_file(**KEYS)
    assert pool.run(signalled, recipe, "search", 2) == [["Preempted", ""]]
    assert pool.run(signalled, recipe, "search", 1) == [["Preempted", ""]]  # partial results are kept
    assert pool.run(signalled, recipe, "none", 1)[0][0] == "done"
