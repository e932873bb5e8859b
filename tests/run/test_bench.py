"""`minitron bench`: with trtllm-bench and vLLM's benchmark, without them, and in torch."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from minitron_megatron.convert import load_hf, save_hf
from minitron_megatron.errors import DataError, RecipeError
from minitron_megatron.files import read_json
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe
from minitron_megatron.report import bench_tables, plot_bench
from minitron_megatron.run import bench
from minitron_megatron.testing import Pool

Write = Callable[..., Path]
KEYS = {"ladder": [[4, 4], [8, 4], [30000, 10]], "batches": [2, 3], "requests": 4}
TOOL = """#!/usr/bin/env python3
import json, sys
args = dict(zip(sys.argv[1:], sys.argv[2:]))
lines = open(args["--dataset"]).read().splitlines()
if "broken" in args["--model_path"]:
    sys.exit("out of memory")
speed = 300.0 if args["--model_path"].endswith("export") else 100.0
json.dump({"performance": {"system_output_throughput_tok_s": speed * len(lines)}}, open(args["--report_json"], "w"))
"""


VLLM = """#!/usr/bin/env python3
import json, sys
assert sys.argv[1:3] == ["bench", "throughput"]
args = dict(zip(sys.argv[1:], sys.argv[2:]))
assert int(args["--max-model-len"]) == int(args["--random-input-len"]) + int(args["--random-output-len"])
assert args["--num-prompts"] == "4" and int(args["--max-num-seqs"]) in (2, 3)
speed = 6.0 if args["--model"].endswith("export") else 2.0
json.dump({"requests_per_second": speed, "tokens_per_second": 1e9}, open(args["--output-json"], "w"))
"""


def copy(topology: Topology, source: Path, to: Path) -> None:
    save_hf(load_hf(source, topology), to, topology, files_from=source)


@pytest.fixture
def exported(recipe_file: Write, pool: Pool) -> Path:
    """Recipe with an exported student, a copy of the teacher."""
    path = recipe_file(bench=KEYS)
    recipe = load_recipe(path)
    pool.run(copy, recipe.model, recipe.out / "export")
    return path


def test_without_the_tool_it_says_what_to_run(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    recipe = load_recipe(exported)
    rows = bench(recipe)
    assert [(row["inputs"], row["batch"]) for row in rows] == [(4, 2), (4, 3), (8, 2), (8, 3)]
    assert all(row["teacher"] is None and "ratio" not in row for row in rows)
    script = (recipe.out / "bench" / "trtllm" / "commands.sh").read_text()
    assert script.count("trtllm-bench") == 8 and "--concurrency 3" in script
    assert len((recipe.out / "bench" / "trtllm" / "4-4-b2.jsonl").read_text().splitlines()) == 4
    assert plot_bench(rows, recipe.out / "plot.png", paper=True) is None and bench_tables(rows) == []


def installed(tool: Path, program: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write a program that stands for a server's benchmark."""
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(program)
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tool.parent}{os.pathsep}{os.environ['PATH']}")
    return tool


def test_reports_become_ratios(exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = installed(tmp_path / "bin" / "trtllm-bench", TOOL, monkeypatch)
    recipe = load_recipe(exported)
    rows = bench(recipe)
    assert [row["ratio"] for row in rows] == pytest.approx([3.0] * 4)
    assert [row.get("ratio_batches") for row in rows] == [None, 3.0, None, 3.0]
    assert rows[0]["student"]["tokens_per_second"] == 1200.0
    assert [table.row_count for table in bench_tables(rows)] == [4, 4]
    assert read_json(recipe.out / "bench" / "table.json")["rows"] == json.loads(json.dumps(rows))
    plot = plot_bench(rows, recipe.out / "plot.png", paper=True)
    assert plot and plot.stat().st_size > 5000
    tool.unlink()
    assert bench(recipe) == rows  # existing reports are not measured again
    (recipe.out / "bench" / "trtllm" / "4-4-b2-teacher.json").write_text("{")
    with pytest.raises(DataError, match="is not a report"):
        bench(recipe)


def test_vllm_counts_the_generated_tokens_alone(
    exported: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    installed(tmp_path / "bin" / "vllm", VLLM, monkeypatch)
    rows = bench(load_recipe(exported), "vllm")
    assert [row["ratio"] for row in rows] == pytest.approx([3.0] * 4)
    assert rows[2]["student"]["tokens_per_second"] == 6.0 * 4 and rows[2]["student"]["requests_per_second"] == 6.0
    assert [table.row_count for table in bench_tables(rows)] == [4, 4]


def test_torch_gives_a_ratio_anywhere(exported: Path) -> None:
    rows = bench(load_recipe(exported, ["bench.batches=[1]", "bench.ladder=[[4,4]]"]), "torch")
    assert rows[0]["teacher"]["first_token_ms"] > 0
    assert 0.1 < rows[0]["ratio"] < 10  # the same model twice


def test_what_cannot_be_measured_is_one_message(recipe_file: Write, exported: Path) -> None:
    with pytest.raises(RecipeError, match=r"export does not exist. Run `minitron run` first"):
        bench(load_recipe(recipe_file("other.yaml", out=str(exported.parent / "none"))))
    with pytest.raises(
        RecipeError, match=r"no entry of bench\.ladder fits the context of \d+ tokens\. Give shorter ones"
    ):
        bench(load_recipe(exported, ["bench.ladder=[[30000,10]]"]))
