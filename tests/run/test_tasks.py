"""Harness tasks in a run: scores in the summary, layers chosen by Winogrande; and the contents of an export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open

from minitron_megatron.errors import DataError, PlanError, RecipeError
from minitron_megatron.files import read_json
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe
from minitron_megatron.records import DepthScores
from minitron_megatron.report import print_summary, write_report
from minitron_megatron.run import dry_run, run
from minitron_megatron.testing import Pool

Write = Callable[..., Path]


def work(topology: Topology, recipe: Path, overrides: tuple[str, ...] = (), only: str | None = None) -> None:
    run(load_recipe(recipe, overrides), topology, only=only)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    root = tmp_path / "tasks"
    data: dict[str, list[dict[str, Any]]] = {
        "lambada_openai/test": [{"text": f"w{i} w{i + 7} w{i + 14} w{i + 21}"} for i in range(1, 9)],
        "winogrande/validation": [
            {"sentence": f"w{i} w{i + 7} _ w{i + 21}", "option1": f"w{i + 14}", "option2": "w3", "answer": "1"}
            for i in range(1, 13)
        ],
        "winogrande/train": [{"sentence": "w1 _ w9", "option1": "w2", "option2": "w3", "answer": "1"}] * 6,
    }
    for name, rows in data.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def shortened(recipe_file: Write, files: Path, **keys: Any) -> Path:
    evaluate = {"samples": 16, "micro_batch": 2, "task_files": str(files), "truncate": True}
    evaluate["tasks"] = [{"name": "lambada_openai", "metric": "acc"}]
    return recipe_file(correct=None, random_baseline=False, evaluate=evaluate, **keys)


def test_scores_stand_beside_losses_and_in_the_card(
    recipe_file: Write, pool: Pool, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shortened(recipe_file, files, export={"dtype": "bfloat16", "quantize": "fp8", "quantize_samples": 4})
    pool.run(work, path, tp=2)
    out = load_recipe(path).out
    rows = read_json(out / "summary.json")
    assert [list(row["tasks"]) for row in rows] == [["lambada_openai"]] * 3
    for row in rows:
        found = read_json(out / "evaluation" / f"{row['model']}.json")
        assert found["results"]["lambada_openai"]["acc,none"] == row["tasks"]["lambada_openai"]
        assert len(found["samples"]["lambada_openai"]) == 8
    table = (out / "evaluation" / "table.md").read_text().splitlines()
    assert table[0] == "| model | lambada_openai |" and len(table) == 5
    print_summary(rows)
    assert "lambada" in capsys.readouterr().out
    assert "lambada_openai" in write_report(out).read_text()
    card = (out / "export" / "README.md").read_text()
    about = yaml.safe_load(card.split("---")[1])
    assert about["base_model"] == "model" and "minitron" in about["tags"]
    for said in ("lambada_openai", f"{rows[2]['loss_nats_per_token']:.4f}", "licence", "megatron-core", "corpus"):
        assert said in card
    assert str(files.parent) not in card.replace(str(files), "")
    with safe_open(out / "export-fp8" / "model.safetensors", "pt") as file:
        assert "F8_E4M3" in {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert (out / "export-fp8" / "README.md").read_text() == card


def test_another_task_trains_nothing_again(recipe_file: Write, pool: Pool, files: Path) -> None:
    path = shortened(recipe_file, files)
    pool.run(work, path)
    steps = dry_run(load_recipe(path, ["evaluate.tasks=[{name: lambada_openai}, {name: winogrande, shots: 0}]"]))
    assert [step.stage for step in steps if step.state != "done"] == ["evaluate", "export"]


@pytest.mark.parametrize("layout", [{}, {"pp": 2}])
def test_layers_are_chosen_by_winogrande(recipe_file: Write, pool: Pool, files: Path, layout: dict) -> None:
    """Each position of the removed block has an accuracy, equal at every layout; the best block is removed."""
    path = shortened(recipe_file, files, prune={"layers": 3}, score={"samples": 8, "depth": {"metric": "winogrande"}})
    for stage in ("prepare", "score", "prune"):
        pool.run(work, path, (), stage, **layout)
    out = load_recipe(path).out
    found = DepthScores.load(out / "scores" / "depth.json")
    assert (found.metric, found.lower_is_better, found.lengths) == ("winogrande", False, (2,))
    assert {round(value * 12, 6) % 1 for value in [found.baseline, *found.blocks.values()]} == {0.0}
    best = max(found.of_length(2), key=lambda first: (found.of_length(2)[first], -first))
    kept = read_json(out / "stages" / "prune.json")["result"]["layers"]
    assert kept == [layer for layer in range(5) if layer not in (best, best + 1)]


@pytest.mark.parametrize(
    ("override", "error", "says"),
    [
        ("evaluate.tasks=[{name: lambada_openay}]", RecipeError, r"no task lambada_openay\. Did you mean"),
        ("evaluate.tasks=[{name: hellaswag}]", DataError, r"hellaswag has no \.jsonl file"),
        ("evaluate.suite=base", DataError, r"has no \.jsonl file"),
        ("prune.ffn=40", PlanError, r"FP8 needs multiples of 16, but ffn is 40\. Prune to 32 or 48"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(
    recipe_file: Write, pool: Pool, files: Path, override: str, error: type[Exception], says: str
) -> None:
    path = shortened(recipe_file, files, export={"quantize": "fp8"})
    with pytest.raises(error, match=says):
        pool.run(work, path, (override,))
    assert not load_recipe(path).out.exists()
