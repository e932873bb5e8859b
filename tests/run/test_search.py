"""The stage `search`: the same table at every layout and after kills, the winner in later stages, early errors."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import pytest
import yaml
from rich.console import Console

from minitron_megatron.convert import read_config
from minitron_megatron.errors import MinitronError, RecipeError, TopologyError
from minitron_megatron.files import read_json
from minitron_megatron.forecast import estimate
from minitron_megatron.forecast.candidates import candidates_of, conditions_of, speed_rows
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe
from minitron_megatron.report import describe, write_report
from minitron_megatron.run import bench, dry_run, run, search_task
from minitron_megatron.search import costs_of
from minitron_megatron.testing import Pool
from tests.recipes import tiny_recipe
from tests.run.test_run import in_a_process

Write = Callable[..., Path]

LIGHT = {"top": 3, "tokens": 6 * 8 * 16, "measure_every": 2}
SEARCH: dict[str, Any] = {
    "layers": [3, 4, 5],
    "hidden": [32, 48],
    "ffn": {"from": 32, "to": 64, "step": 32},
    "heads": [8],
    "budget": {"params": [40_000, 60_000]},
    "light": LIGHT,
}
KEYS: dict[str, Any] = {"correct": None, "random_baseline": False, "prune": None, "search": SEARCH}


def work(topology: Topology, recipe: Path, overrides: tuple[str, ...] = (), only: str | None = None) -> None:
    run(load_recipe(recipe, overrides), topology, only=only)


def share(topology: Topology, recipe: Path, task: int, tasks: int) -> str:
    return search_task(load_recipe(recipe), topology, task, tasks)


def table(recipe: Path) -> dict[str, Any]:
    return read_json(load_recipe(recipe).out / "search" / "table.json")


def written(material: Path, folder: Path, **search: Any) -> Path:
    """Write a recipe with a run folder of its own and some keys of `search` replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    keys = tiny_recipe(material) | KEYS | {"search": SEARCH | search, "out": str(folder / "run")}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in keys.items() if value is not None}))
    return path


def scored(searched: Path, recipe: Path) -> Path:
    """Return `recipe` after copying the finished run's stages before the search into its run folder."""
    source, target = load_recipe(searched).out, load_recipe(recipe).out
    copytree(source, target)
    rmtree(target / "search")
    for path in (target / "stages").glob("*.json"):
        if path.stem not in ("prepare", "score"):
            path.unlink()
    return recipe


@pytest.fixture(scope="module")
def searched(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recipe of an uninterrupted run with a search."""
    recipe = written(material, tmp_path_factory.mktemp("searched"))
    assert in_a_process(recipe) == 0
    return recipe


def test_the_winner_is_pruned_and_distilled_as_if_it_were_typed(searched: Path, material: Path, pool: Pool) -> None:
    found, out = table(searched), load_recipe(searched).out
    winner = found["candidates"][0]
    reached = [row for row in found["candidates"] if "6" in row["curve"]]
    assert winner["winner"] and len(reached) == 3
    assert winner["loss"] == winner["curve"]["6"] == min(row["curve"]["6"] for row in reached)
    config = read_json(out / "export" / "config.json")
    told = {"num_hidden_layers": "layers", "hidden_size": "hidden", "intermediate_size": "ffn"}
    assert {axis: config[key] for key, axis in told.items()} == {axis: winner["sizes"][axis] for axis in told.values()}
    rows = {row["model"]: row for row in read_json(out / "summary.json")}
    assert rows["distilled"]["parameters"] == winner["costs"]["params"]
    assert read_json(out / "predicted.json")["parameters"]["export"] == winner["costs"]["params"]
    typed = tiny_recipe(material) | KEYS | {"search": None, "out": str(out.parent / "typed")}
    sizes = {axis: size for axis, size in winner["sizes"].items() if axis != "layers"}
    typed["prune"] = sizes | ({"layers": winner["layers"]} if winner["layers"] else {})
    path = out.parent / "typed.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in typed.items() if value is not None}))
    pool.run(work, path)
    hashes = [read_json(run / "stages" / "distill.json")["result"]["hash"] for run in (out, out.parent / "typed")]
    assert hashes[0] == hashes[1]


def test_a_finished_search_is_not_run_again_and_an_edited_one_measures_only_what_is_new(
    searched: Path, material: Path, tmp_path: Path, pool: Pool
) -> None:
    assert {step.state for step in dry_run(load_recipe(searched))} == {"done"}
    recipe = written(material, tmp_path / "wider", budget={"params": [30_000, 60_000]})
    copytree(load_recipe(searched).out, load_recipe(recipe).out)
    parts = load_recipe(recipe).out / "search" / "parts"
    before = {path.relative_to(parts): path.stat().st_mtime_ns for path in parts.rglob("*.json")}
    states = {step.stage: step.state for step in dry_run(load_recipe(recipe))}
    assert states["score"] == "done" and states["search"] == "resume" and states["prune"] == "run"
    pool.run(work, recipe, (), "search")
    after = {path.relative_to(parts): path.stat().st_mtime_ns for path in parts.rglob("*.json")}
    assert before.items() < after.items()
    assert len(table(recipe)["candidates"]) > len(table(searched)["candidates"])


def test_a_killed_search_goes_on_to_the_same_table(searched: Path, material: Path, tmp_path: Path) -> None:
    recipe = scored(searched, written(material, tmp_path))
    assert in_a_process(recipe, ("search", "light", 9)) == -signal.SIGKILL
    parts = list((load_recipe(recipe).out / "search" / "parts").rglob("*.json"))
    assert len(parts) >= 4
    assert {step.stage: step.state for step in dry_run(load_recipe(recipe))}["search"] == "resume"
    before = {path: path.stat().st_mtime_ns for path in parts}
    assert in_a_process(recipe, until="search") == 0
    assert table(recipe) == table(searched)
    kept = [path for path, when in before.items() if path.stat().st_mtime_ns == when]
    assert len(kept) >= len(parts) - 1  # only the candidate at work is measured again


@pytest.mark.parametrize(
    ("layout", "apart"),
    [
        ({"dp": 2}, False),
        ({"tp": 2, "pp": 2}, False),
        ({"tp": 2, "dp": 2}, True),
    ],
    ids=str,
)
def test_the_curves_do_not_depend_on_the_layout_nor_on_who_trains(
    searched: Path, material: Path, tmp_path: Path, pool: Pool, layout: dict[str, int], apart: bool
) -> None:
    recipe = written(material, tmp_path, light=LIGHT | {"independent_replicas": apart})
    stages = ["search"]
    if "pp" in layout:  # the scores too are measured at the layout
        stages = ["prepare", "score", "search"]
    else:
        scored(searched, recipe)
    keys = tuple(f"parallel.{key}={value}" for key, value in layout.items() if key != "dp")
    for stage in stages:
        pool.run(work, recipe, keys, stage, **layout)
    for row, expected in zip(table(recipe)["candidates"], table(searched)["candidates"], strict=True):
        assert [row[key] for key in ("name", "winner", "layers")] == [
            expected[key] for key in ("name", "winner", "layers")
        ]
        assert row["after_cut"] == pytest.approx(expected["after_cut"], abs=1e-5)
        assert row["curve"] == pytest.approx(expected["curve"], abs=1e-5)


def test_tasks_of_an_array_share_the_work_to_the_same_table(
    searched: Path, material: Path, tmp_path: Path, pool: Pool
) -> None:
    recipe = scored(searched, written(material, tmp_path, light=LIGHT | {"halvings": 1}))
    together = scored(searched, written(material, tmp_path / "together", light=LIGHT | {"halvings": 1}))
    pool.run(work, together, (), "search")
    count = len(table(together)["candidates"])
    assert (
        pool.run(share, recipe, 0, 2)[0]
        == f"Measured right after pruning: {(count + 1) // 2} of {count} candidates. Other tasks measure the rest."
    )
    said = pool.run(share, recipe, 1, 2)[0]
    assert said == "Distilled to step 3: 1 of 3 candidates. Other tasks distil the rest."
    assert pool.run(share, recipe, 0, 2)[0].startswith("Distilled to step 6: 1 of 2 candidates.")
    pool.run(share, recipe, 1, 2)
    assert pool.run(share, recipe, 0, 2)[0].startswith("Every candidate is measured")
    pool.run(work, recipe, (), "search")
    assert table(recipe) == table(together)


def test_halving_takes_out_the_worse_half_and_changes_nothing_for_those_that_stay(
    searched: Path, material: Path, tmp_path: Path, pool: Pool
) -> None:
    light = LIGHT | {"top": None, "halvings": 1, "measure_every": 3}
    recipe = scored(searched, written(material, tmp_path, light=light))
    pool.run(work, recipe, (), "search")
    rows = table(recipe)["candidates"]
    whole = [row for row in rows if "6" in row["curve"]]
    assert len(whole) == -(-len(rows) // 2) > 2
    assert all(set(row["curve"]) == {"3"} for row in rows if row not in whole)
    assert max(row["curve"]["3"] for row in whole) <= min(row["curve"]["3"] for row in rows if row not in whole)
    expected = {row["name"]: row["curve"] for row in table(searched)["candidates"]}
    both = [(row["curve"]["6"], expected[row["name"]]["6"]) for row in whole if expected[row["name"]]]
    assert both and all(mine == theirs for mine, theirs in both)


def test_a_budget_in_time_is_held_by_a_table_of_this_machine(searched: Path, material: Path, tmp_path: Path) -> None:
    """Candidates are measured before there is a student, and the search uses the fit to these times."""
    times = {
        "heads": [4, 8],
        "budget": {"params": [1, 60_000], "decode_ms": 1e6},
        "serving": {"table": str(tmp_path / "table.json")},
    }
    recipe = load_recipe(written(material, tmp_path, **times), ["bench.ladder=[[4,6],[16,6]]", "bench.batches=[1,4]"])
    rows = bench(recipe, "torch")
    measured = read_json(recipe.out / "bench" / "table.json")
    assert len(rows) == 4 and len(measured["shapes"]) == 6 and "teacher" in measured["shapes"]
    (tmp_path / "table.json").write_bytes((recipe.out / "bench" / "table.json").read_bytes())
    speeds = speed_rows(tmp_path / "table.json")
    assert {row.conditions.batch for row in speeds} == {1, 4} and len(speeds) == 24
    teacher = read_config(recipe.model).shape
    with pytest.raises(RecipeError, match="nothing needs to be cut"):
        candidates_of(recipe, teacher)
    costs = costs_of(teacher, conditions_of(recipe))
    limited = load_recipe(tmp_path / "recipe.yaml", [f"search.budget.decode_ms={0.999 * costs['decode_ms']}"])
    assert all(each.costs["decode_ms"] < costs["decode_ms"] for each in candidates_of(limited, teacher))


def test_a_search_may_choose_by_the_knee_or_by_hand(searched: Path, material: Path, tmp_path: Path, pool: Pool) -> None:
    rows = table(searched)["candidates"]
    knee = scored(searched, written(material, tmp_path / "knee", choose="pareto", light=None))
    pool.run(work, knee, (), "search")
    points = [(row["loss"], row["costs"]["params"]) for row in table(knee)["candidates"]]
    best = {point for point in points if not any(o != point and o[0] <= point[0] and o[1] <= point[1] for o in points)}
    assert {(row["loss"], row["costs"]["params"]) for row in table(knee)["candidates"] if row["front"]} == best
    chosen = next(row for row in table(knee)["candidates"] if row["winner"])
    assert chosen["front"]
    hand = written(material, tmp_path / "hand", winner=rows[-1]["name"])
    copytree(load_recipe(searched).out, load_recipe(hand).out)
    pool.run(work, hand, (), "search")
    assert next(row["name"] for row in table(hand)["candidates"] if row["winner"]) == rows[-1]["name"]
    with pytest.raises(RecipeError, match=r"not a candidate\. Did you mean"):
        pool.run(work, hand, (f"search.winner={rows[-1]['name']}0",), "search")


def by_a_task(material: Path, folder: Path, metric: str, **search: Any) -> Path:
    """Return a search of few candidates, some with fewer layers, chosen by a task; `metric`: of layers."""
    few = {"layers": [3, 4], "hidden": [48], "ffn": [32, 64], "heads": [8], "budget": {"params": [30_000, 70_000]}}
    recipe = written(material, folder, **few, **search)
    keys = yaml.safe_load(recipe.read_text()) | {"score": {"samples": 8, "depth": {"metric": metric}}}
    keys["evaluate"] |= {"task_files": str(folder / "tasks"), "truncate": True, "tasks": [{"name": "lambada_openai"}]}
    recipe.write_text(yaml.safe_dump(keys))
    winogrande = [
        {"sentence": f"w{i} w{i + 7} _ w{i + 21}", "option1": f"w{i + 14}", "option2": "w3", "answer": "1"}
        for i in range(1, 13)
    ]
    for name, rows in {
        "lambada_openai/test": [{"text": f"w{i} w{i + 7} w{i + 14} w{i + 21}"} for i in range(1, 9)],
        "winogrande/validation": winogrande,
        "winogrande/train": winogrande[:6],
    }.items():
        path = folder / "tasks" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return recipe


def searched_by(pool: Pool, recipe: Path, **layout: int) -> dict[str, Any]:
    keys = tuple(f"parallel.{key}={value}" for key, value in layout.items() if key != "dp")
    for stage in ("prepare", "score", "search"):
        pool.run(work, recipe, keys, stage, **layout)
    return table(recipe)


def test_a_task_chooses_alike_at_another_layout(material: Path, tmp_path: Path, pool: Pool) -> None:
    """The task's first metric is a perplexity (lower is better); layers are chosen by block importance."""
    one, split = (
        searched_by(pool, by_a_task(material, tmp_path / name, "bi", choose="lambada_openai", light=None), **spread)
        for name, spread in (("one", {}), ("split", {"tp": 2, "pp": 2}))
    )
    scores = {row["name"]: row["score"] for row in one["candidates"]}
    assert len(scores) > 2 and max(scores.values()) < -1  # a negated perplexity
    assert [row["name"] for row in one["candidates"] if row["winner"]] == [max(scores, key=lambda name: scores[name])]
    for found, expected in zip(split["candidates"], one["candidates"], strict=True):
        assert {key: found[key] for key in ("name", "layers", "winner")} == {
            key: expected[key] for key in ("name", "layers", "winner")
        }
        assert found["score"] == pytest.approx(expected["score"], rel=1e-4)


def test_a_task_chooses_among_the_distilled_and_winogrande_the_layers(
    material: Path, tmp_path: Path, pool: Pool
) -> None:
    light = LIGHT | {"top": 2}
    recipe = by_a_task(material, tmp_path, "winogrande", choose="lambada_openai", light=light)
    rows = searched_by(pool, recipe)["candidates"]
    assert read_json(load_recipe(recipe).out / "scores" / "depth.json")["metric"] == "winogrande"
    distilled = {row["name"]: row["score"] for row in rows if "6" in row["curve"]}
    assert len(distilled) == 2
    assert [row["name"] for row in rows if row["winner"]] == [max(distilled, key=lambda name: distilled[name])]


def test_the_report_shows_who_was_found_and_when_the_ranks_settled(searched: Path) -> None:
    out, found = load_recipe(searched).out, table(searched)
    page = write_report(out).read_text()
    assert all(name in page for name in [row["name"] for row in found["candidates"]][:3])
    assert "chosen" in page
    with (shown := Console(width=80)).capture() as said:
        shown.print(describe(out))
    assert "chosen" in said.get()
    for plot in ("search", "ranks"):
        assert (out / "plots" / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
    assert [step for step, _ in found["settled"]] == [2, 4, 6] and found["settled"][-1][1] == 1.0


def test_an_estimate_lists_what_each_candidate_would_cost(searched: Path) -> None:
    rows = {row["name"]: row for row in estimate(load_recipe(searched)).candidate_rows()}
    for row in table(searched)["candidates"]:
        assert rows[row["name"]]["costs"] == row["costs"] and rows[row["name"]]["hours"] > 0
    assert len(rows) == len(table(searched)["candidates"])


WRONG: list[tuple[str, dict[str, Any], dict[str, int], type[MinitronError], str]] = [
    ("an empty grid", {"budget": {"params": 1000}}, {}, RecipeError, "budget.params: at most 1,000 excludes all"),
    ("a budget above the teacher", {"budget": {"params": 1e9}}, {}, RecipeError, "nothing needs to be cut"),
    ("a candidate the layout cannot hold", {"ffn": [33, 64]}, {"tp": 2}, TopologyError, "ffn33-heads"),
    ("too few layers for the stages", {"layers": [1, 4]}, {"pp": 2}, TopologyError, "candidate layers1-"),
    ("a task that is not measured", {"choose": "winogrande"}, {}, RecipeError, "tasks must be listed under evaluate"),
    ("a light batch that does not divide", {"light": LIGHT | {"global_batch": 3}}, {}, RecipeError, "search.light."),
    (
        "replicas that cannot part",
        {"light": LIGHT | {"independent_replicas": True}},
        {"dp": 2, "cp": 2},
        TopologyError,
        "cannot work",
    ),
    ("a table of speeds that is none", {"serving": {"table": "no.json"}}, {}, RecipeError, "not a table of speeds"),
]


@pytest.mark.parametrize(("case", "changes", "layout", "kind", "said"), WRONG, ids=[case[0] for case in WRONG])
def test_what_is_wrong_is_one_error_before_anything_is_written(
    material: Path,
    tmp_path: Path,
    pool: Pool,
    case: str,
    changes: dict[str, Any],
    layout: dict[str, int],
    kind: type[MinitronError],
    said: str,
) -> None:
    recipe = written(material, tmp_path, **({"budget": {"params": [1, 60_000]}} | changes))
    with pytest.raises(kind) as caught:
        pool.run(work, recipe, tuple(f"parallel.{k}={v}" for k, v in layout.items() if k != "dp"), **layout)
    assert said in str(caught.value)
    assert not load_recipe(recipe).out.exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prune": {"ffn": 32}}, "remove the sizes in `prune`"),
        ({"prune": {"iterations": 2}}, "in one step, without merging"),
        ({"search": SEARCH | {"budget": {}}}, "needs a budget"),
        ({"search": SEARCH | {"hiden": [4]}}, "search.hiden is not a known key. Did you mean 'hidden'?"),
        ({"search": SEARCH | {"layers": {"from": 3}}}, "{from: 16, to: 32, step: 4}"),
        ({"search": SEARCH | {"multiples": {"fnn": 4}}}, "Did you mean 'ffn'?"),
        (
            {"search": SEARCH | {"multiples": {"ffn": "heads x head_dim"}}},
            "multiples.ffn is 'heads x head_dim'. Give a whole number",
        ),
        ({"search": SEARCH | {"multiples": {"hidden": "heads"}}}, "number; hidden may also be 'heads x head_dim'"),
        ({"search": SEARCH | {"multiples": {"hidden": 0}}}, "search.multiples.hidden"),
        ({"search": SEARCH | {"multiples": {"hidden": "4 heads"}}}, "search.multiples.hidden"),
        ({"search": SEARCH | {"serving": {"gpu": "H10"}}}, "the GPU 'H10' is not known. Did you mean 'H100'?"),
        ({"search": None}, "prune is missing: give the sizes to keep in `prune`, a `search` for them, or a `student`"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(material: Path, tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    keys = tiny_recipe(material) | deepcopy(KEYS) | changes
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in keys.items() if value is not None}))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert said in str(caught.value)
