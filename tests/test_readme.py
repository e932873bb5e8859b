"""Every command and code block of the README runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.convert import load_hf
from minitron_megatron.files import write_json
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe
from minitron_megatron.testing import Pool
from tests.forecast.test_presets import NEMO
from tests.forecast.test_presets import teacher as config_alone
from tests.guide import ROOT, commands, run_command
from tests.recipes import tiny_recipe
from tests.tiny import samples, share

README = (ROOT / "README.md").read_text()


def test_the_two_make_commands_are_targets() -> None:
    targets = re.findall(r"^(\w+):.*##", (ROOT / "Makefile").read_text(), re.M)
    assert (
        {line.split()[1] for line in commands(ROOT / "README.md") if line.startswith("make")}
        == {"quickstart", "test"}
        <= set(targets)
    )


def test_the_picture_is_drawn_from_the_printed_numbers(tmp_path: Path) -> None:
    """`make picture`, on a run with the numbers that the page prints, draws the picture that the page shows."""
    from matplotlib.image import imread

    printed = README.replace("corrected  ", "corrected teacher  ")
    rows = re.findall(r"^ (\w+(?: \w+)?) {2,}([\d.]+) M +([\d.]+) +([\d.]+) ", printed, re.M)
    summary = [
        {"model": name, "parameters": round(1e6 * float(size)), "loss_nats_per_token": float(loss)}
        | {"perplexity": float(perplexity), "tokens": 0, "seconds": 0.0}
        for name, size, loss, perplexity in rows
    ]
    assert [row["model"] for row in summary] == ["teacher", "corrected teacher", "pruned", "distilled", "random init"]
    write_json(tmp_path / "summary.json", summary)
    (tmp_path / "recipe.yaml").write_text("")
    made = [f"RUN={tmp_path}", f"PICTURE={tmp_path / 'made.png'}", f"BIN={Path(sys.executable).parent}"]
    there = os.environ | {"PYTHONPATH": str(ROOT)}
    stamp = "STAMP=setup.py"  # what is installed is tested
    subprocess.run(["make", "--old-file=setup.py", stamp, *made, "picture"], cwd=ROOT, env=there, check=True)
    found, shown = imread(tmp_path / "made.png"), imread(ROOT / "docs" / "quickstart.png")
    assert found.shape == shown.shape
    assert abs(found - shown).mean() < 5e-4, "another loss by 0.01 is 8e-4"


def test_the_commands_for_ones_own_model_run(material: Path, recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    """In the order of the page, on a tiny model and the recipe made for it."""
    training = tiny_recipe(material)["distill"] | {"tokens": 3 * 32 * 16, "global_batch": 32}
    shared = {key: {"samples": 32, "micro_batch": 4} for key in ("score", "evaluate")}  # by eight GPUs, as batches are
    shared |= {"correct": training, "distill": training, "bench": {"ladder": [[4, 4]], "batches": [1]}}
    recipe = recipe_file("recipe.yaml", **shared)
    own = [line for line in commands(ROOT / "README.md") if not line.startswith("make")]
    assert len(own) == 8
    nemo = config_alone(tmp_path / "nemo", NEMO)
    (tmp_path / "text").mkdir()
    with (tmp_path / "text" / "corpus.jsonl").open("wb") as corpus:
        corpus.truncate(2**40)  # as large as the budgets of the preset; it takes no room
    places = {"path/to/llama": material / "model", "> recipe.yaml": f"> {tmp_path / 'init'}", "recipe.yaml": recipe}
    places |= {"path/to/Mistral-Nemo-Base-2407": nemo, "path/to/folder": tmp_path / "megatron"}
    places |= {"path/to/corpus": tmp_path / "text"}
    for line in own:
        done = run_command(line, ROOT, places)
        assert done.returncode == 0, (line, done.stderr)
        if "--format megatron" in line:
            assert (tmp_path / "megatron" / "megatron-args.sh").read_text() in done.stdout
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()
    assert (tmp_path / "megatron" / "latest_checkpointed_iteration.txt").is_file()


def test_the_recipe_is_one(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.S)
    (tmp_path / "recipe.yaml").write_text(block)
    recipe = load_recipe(tmp_path / "recipe.yaml")
    assert (recipe.prune.hidden, recipe.prune.ffn, recipe.distill.tokens) == (3072, 9216, 94_000_000_000)


def job(topology: Topology, model_folder: Path, code: str) -> tuple[int, ...]:
    model: Any = load_hf(model_folder, topology)
    names: dict[str, Any] = {"model": model, "batches": share(samples(8), topology), "topology": topology}
    exec(code, names)
    shape = names["plan"].target
    return shape.hidden, shape.ffn, sum(p.numel() for chunk in names["student"] for p in chunk.parameters())


@pytest.mark.parametrize("layout", [{}, {"tp": 2}], ids=["tp1", "tp2"])
def test_the_python_block_runs(material: Path, pool: Pool, layout: dict[str, int]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    code = code.replace("3072", "32").replace("9216", "48")
    hidden, ffn, _ = pool.run(job, material / "model", code, **layout)[0]
    assert (hidden, ffn) == (32, 48)
