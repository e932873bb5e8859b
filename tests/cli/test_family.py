"""A family of students in one recipe: its runs, what they share, its costs and its errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.errors import MinitronError
from minitron_megatron.files import checksum, read_json
from minitron_megatron.forecast import check, family_runs
from minitron_megatron.parallel import PlannedTopology
from minitron_megatron.recipe import load_recipe
from tests.cli.test_commands import call, say

Write = Callable[..., Path]
MIDDLE = {"name": "middle", "set": {"prune": {"ffn": 48, "hidden": 40}}}
SMALL = {
    "name": "small",
    "pruned_from": "middle",
    "teacher": "model",
    "set": {"prune": {"hidden": 32}, "distill.lr": 3e-3},
}


@pytest.fixture
def family(recipe_file: Write) -> Path:
    return recipe_file(prune=None, random_baseline=False, family=[MIDDLE, SMALL])


def test_a_family_runs_shares_its_stages_and_is_compared(family: Path, tmp_path: Path) -> None:
    before = say("run", "--dry-run", family)
    assert before.startswith("middle:") and before.count("run: its model is not made yet") == 8
    assert [line.split()[0] for line in before.partition("small-cut:")[2].split("small:")[0].splitlines()[1:]] == [
        *("prepare", "score", "prune")
    ]
    done = call("run", family)
    assert done.returncode == 0, done.stderr[-2000:]
    out = tmp_path / "run"
    rows = {name: {row["model"]: row for row in read_json(out / name / "summary.json")} for name in ("middle", "small")}
    sizes = [rows[name][row]["parameters"] for name, row in (("middle", "distilled"), ("small", "distilled"))]
    assert rows["middle"]["teacher"]["parameters"] > sizes[0] > sizes[1]
    corrected = [rows[name]["corrected teacher"]["loss_nats_per_token"] for name in rows]
    assert corrected[0] == corrected[1] and len([*(out / "shared" / "correct").glob("*/record.json")]) == 1
    cut, middle = (out / name / "stages" for name in ("small-cut", "middle"))
    assert not (cut / "correct.json").exists() and not (cut / "distill.json").exists()
    assert (
        read_json(cut / "prepare.json")["result"]["model_hash"] == read_json(middle / "distill.json")["result"]["hash"]
    )
    page = (out / "report.html").read_text()
    assert "middle" in page and "small" in page and str(out / "report.html") in done.stdout
    made = checksum(out / "small" / "distilled" / "model.safetensors")
    again = call("run", family, "--set", "parallel.tp=2", ranks=2)
    assert again.returncode == 0 and checksum(out / "small" / "distilled" / "model.safetensors") == made
    assert {line.split()[1] for line in say("run", "--dry-run", family).splitlines() if not line.endswith(":")} == {
        "done"
    }


def test_the_costs_of_a_family_are_those_of_its_runs(family: Path) -> None:
    text = say("estimate", family)
    for name in ("middle", "small-cut", "small"):
        assert any(line.split()[:1] == [name] for line in text.splitlines())
    assert "times with the teachers' forward passes" in " ".join(text.split())
    alone = say("estimate", family, "--slurm")
    assert alone.count("sbatch --nodes=1") == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"family": [MIDDLE, MIDDLE]}, "Two runs of the family would be called middle: rename one of the students"),
        ({"family": [MIDDLE, {**MIDDLE, "name": "middle-cut"}]}, "Two runs of the family would be called middle-cut"),
        (
            {"family": [SMALL]},
            "pruned_from of small is 'middle', which is no student before it. Give model",
        ),
        ({"family": [{**MIDDLE, "teacher": "midle"}]}, "teacher of middle is 'midle', which is no student before it"),
        ({"family": [{"name": "a/b"}]}, "'a/b' cannot be a student's name: use letters, digits, dots, - and _"),
        ({"family": [{"name": "a", "set": {"model": "x"}}]}, "A student of a family cannot set model: remove it"),
        (
            {"family": [{"name": "a", "set": {"prune.hiden": 3}}]},
            "student a of the family: prune.hiden is not a known key. Did you mean 'hidden'?",
        ),
        ({"family": [{"name": "a"}]}, "student a of the family: prune is missing"),
        (
            {"family": [MIDDLE, {**SMALL, "set": {"prune": {"hidden": 44}}}]},
            "student small of the family: axis hidden should keep 44 of 40. Ask for 1 to 40.",
        ),
        (
            {"family": [MIDDLE, {**SMALL, "set": {"prune": {"hidden": 32}, "score.samples": 7}}]},
            "run small-cut of the family: score.samples",
        ),
    ],
)
def test_a_wrong_family_is_one_message(recipe_file: Write, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(MinitronError) as caught:
        say("estimate", recipe_file(prune=None, random_baseline=False, **changes))
    assert said in str(caught.value), caught.value


def test_a_wrong_family_is_exit_2_and_leaves_nothing(recipe_file: Write, tmp_path: Path) -> None:
    last = {**SMALL, "set": {"prune": {"hidden": 32}, "score.samples": 7}}
    done = call("run", recipe_file(prune=None, family=[MIDDLE, last]))
    assert done.returncode == 2 and done.stderr.count("error: run small-cut of the family: ") == 1, done.stderr
    assert not (tmp_path / "run").exists()


def test_a_single_stage_is_that_of_a_student(family: Path) -> None:
    with pytest.raises(MinitronError, match=r"For one of them use the recipe\.yaml in its folder"):
        check(load_recipe(family), PlannedTopology())


def test_one_students_teacher_may_be_another(recipe_file: Write, tmp_path: Path) -> None:
    """Without `teacher` a student is distilled from what it is pruned from; `correct` is of the recipe's model."""
    last = {"name": "last", "pruned_from": "middle", "set": {"prune": {"hidden": 32}}}
    recipe = load_recipe(recipe_file(prune=None, family=[MIDDLE, last]))
    first, second = family_runs(recipe)
    assert (first.name, second.name, first.until, second.until) == ("middle", "last", None, None)
    assert second.recipe.model == tmp_path / "run" / "middle" / "distilled" and second.recipe.student is None
    assert first.recipe.correct is not None and second.recipe.correct is None
