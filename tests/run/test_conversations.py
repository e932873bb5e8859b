"""Conversations in a recipe: what is known before work, a folder's answers in the run, and a score that nobody gave."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.errors import RecipeError
from minitron_megatron.forecast import check_evaluation
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe
from minitron_megatron.report import print_summary
from minitron_megatron.run import evaluate_folder, run
from minitron_megatron.run.fingerprint import task_marks
from minitron_megatron.run.measure_tasks import Measured, write_table
from minitron_megatron.testing import Pool
from tests.evaluate.chat_files import mt_bench

Write = Callable[..., Path]
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"


@pytest.fixture
def path(recipe_file: Write, material: Path, tmp_path: Path) -> Path:
    """Return a recipe with MT-Bench, for a model whose template writes words alone."""
    model = tmp_path / "model"
    shutil.copytree(material / "model", model)
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 2400}
    (model / "config.json").write_text(json.dumps(config))
    (model / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3}))
    (model / "chat_template.jinja").write_text(TEMPLATE)
    mt_bench(tmp_path / "tasks")
    evaluate = {"samples": 8, "task_files": str(tmp_path / "tasks"), "tasks": [{"name": "mt_bench"}]}
    return recipe_file(model=str(model), evaluate=evaluate)


def measured(topology: Topology, path: Path) -> Measured:
    recipe = load_recipe(path)
    run(recipe, topology, only="prepare")
    return evaluate_folder(recipe, topology, recipe.model)


def test_answers_without_a_judge_are_kept_and_have_no_score(
    path: Path, pool: Pool, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = pool.run(measured, path)
    assert row["tasks"] == {"mt_bench": None}
    out = load_recipe(path).out / "evaluation"
    answers = [json.loads(line) for line in (out / "model-mt-bench.jsonl").read_text().splitlines()]
    assert [len(each["choices"][0]["turns"]) for each in answers] == [2, 2]
    assert json.loads((out / "model.json").read_text())["results"]["mt_bench"]["rating,none"] is None
    write_table([row], out / "table.md")
    assert (out / "table.md").read_text().splitlines()[-1] == "| model | - |"
    print_summary([row])
    assert "mt_bench" in capsys.readouterr().out


def test_an_edited_template_counts_where_conversations_go_through_it(path: Path) -> None:
    recipe = load_recipe(path)
    plain = load_recipe(path, ["evaluate.tasks=[]"])
    before = task_marks(recipe), task_marks(plain)
    (recipe.model / "chat_template.jinja").write_text(f"Now: {TEMPLATE}")
    assert task_marks(recipe) != before[0] and task_marks(plain) == before[1]


def test_a_judge_is_checked_before_work(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(*overrides: str, **options: Any) -> None:
        check_evaluation(load_recipe(path, list(overrides)), **options)

    judge = "evaluate.judge={url: http://localhost:1/v1, model: gpt, key_env: JUDGE_KEY}"
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(RecipeError, match=r"the environment variable JUDGE_KEY, .* is not set"):
        check(judge)
    check(judge, counts_only=True)
    monkeypatch.setenv("JUDGE_KEY", "secret")
    check(judge)
    for keys, says in (
        ("{url: localhost, model: gpt}", r"evaluate\.judge\.url is 'localhost': give a URL"),
        ("{url: http://h/v1, modle: gpt}", r"evaluate\.judge\.modle is not a known key\. Did you mean 'model'"),
        ("{url: http://h/v1}", r"evaluate\.judge\.model is missing"),
    ):
        with pytest.raises(RecipeError, match=says):
            check(f"evaluate.judge={keys}")
    with pytest.raises(
        RecipeError, match=r"search\.choose is mt_bench, whose answers have no score without a judge\. Set eval"
    ):
        check("search={hidden: [32], budget: {params: 7e4}, choose: mt_bench}", "prune={}")
