"""The papers' recipes have the papers' parameter counts, fit 32 DGX H100 nodes, and run in miniature."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copy
from typing import Any

import pytest
import yaml

from minitron_megatron import gpus
from minitron_megatron.errors import TopologyError
from minitron_megatron.files import read_json
from minitron_megatron.forecast import estimate, estimate_family
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe
from minitron_megatron.run import run
from minitron_megatron.testing import Pool

PRESETS = Path(__file__).parents[2] / "examples" / "presets"
SHAPES = (PRESETS.parents[1] / "docs" / "guide" / "shapes.md").read_text()
GPUS = 256
PEAK = gpus.GPUS["H100"].flops
LLAMA_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config(kind: str, layers: int, hidden: int, heads: int, ffn: int, vocab: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": kind,
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": ffn,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        **more,
    }


NEMOTRON = config(
    "nemotron", 32, 6144, 48, 24576, 256000, hidden_act="relu2", norm_eps=1e-5, max_position_embeddings=4096
)
LLAMA = config(
    "llama",
    32,
    4096,
    32,
    14336,
    128256,
    rms_norm_eps=1e-5,
    rope_theta=5e5,
    rope_scaling=LLAMA_ROPE,
    max_position_embeddings=131072,
)
NEMO = config(
    "mistral",
    40,
    5120,
    32,
    14336,
    131072,
    rms_norm_eps=1e-5,
    rope_theta=1e6,
    max_position_embeddings=131072,
    sliding_window=None,
)
CASES = {
    "llama-3.1-minitron-4b-width": (LLAMA, 8_030_261_248, 4_512_746_496),
    "llama-3.1-minitron-4b-depth": (LLAMA, 8_030_261_248, 4_540_469_248),
    "mn-minitron-8b": (NEMO, 12_247_782_400, 8_414_105_600),
}


FAMILY = {"8b": 8_271_699_968, "4b-cut": 4_190_509_056, "4b": 4_190_509_056}


def teacher(folder: Path, about: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(about))
    return folder


def material_of(name: str, folder: Path) -> list[str]:
    """Create the files that an estimate of a preset needs: the teacher's config, and a sparse corpus file as large as
    its budgets."""
    with (folder / "corpus.jsonl").open("wb") as corpus:
        corpus.truncate(2**40)
    sources = json.dumps([{"path": str(folder / "corpus.jsonl")}])
    about = NEMOTRON if name == "minitron" else CASES[name][0]
    return [f"model={teacher(folder / 'teacher', about)}", f"data.sources={sources}"]


def test_every_preset_has_its_numbers() -> None:
    assert {path.stem for path in PRESETS.glob("*.yaml")} == {*CASES, "minitron"}
    page = (PRESETS / "README.md").read_text()
    for name, (_, _, student) in CASES.items():
        assert f"[{name}]({name}.yaml)" in page and f"{student:,}" in page
    assert all(f"{student:,}" in page for student in FAMILY.values())


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_the_papers_and_a_rank_holds_them(name: str, tmp_path: Path) -> None:
    _, before, after = CASES[name]
    recipe = load_recipe(PRESETS / f"{name}.yaml", material_of(name, tmp_path))
    found = estimate(recipe, gpus=GPUS)
    assert (found.teacher_parameters, found.student_parameters) == (before, after)
    found.expect_to_fit(80)
    with pytest.raises(
        TopologyError,
        match=r"a rank needs .* GiB before activations, but has 2 GiB\. Raise parallel\.tp or pp, or save",
    ):
        found.expect_to_fit(2)
    phase = recipe.distill
    assert phase.global_batch % (GPUS // recipe.parallel.tp) == 0
    assert found.distill_tokens >= phase.tokens > found.distill_tokens - phase.global_batch * recipe.data.sequence
    assert 1 < found.hours < 1000
    hours = {stage: flops / PEAK / found.mfu / 3600 for stage, flops in found.stage_flops.items()}
    printed = f"{round(hours['distill'], -2):,.0f}" + (
        f" ({round(hours['correct'], -2):,.0f})" if recipe.correct else ""
    )
    rows = [line.split(" | ") for line in SHAPES.splitlines() if line.startswith("| ")]
    [row] = [row for row in rows if row[0].strip("|` ").lower().rpartition("`")[2] == name]
    assert printed == row[-2], "docs/guide/shapes.md prints the estimate"


def test_the_family_has_the_papers_sizes_and_saving(tmp_path: Path) -> None:
    found = estimate_family(load_recipe(PRESETS / "minitron.yaml", material_of("minitron", tmp_path)), gpus=GPUS)
    assert {name: each.student_parameters for name, each in found.runs.items()} == FAMILY
    assert found.runs["4b"].teacher_parameters == 15_628_775_424
    assert found.runs["4b-cut"].teacher_parameters == FAMILY["8b"]
    assert found.runs["4b-cut"].flops < 1e-3 * found.runs["4b"].flops
    cost, passes = 15.628775424 * 40 + 8.271699968 + 4.190509056, 2 * 15.628775424 / 3
    assert found.saving == pytest.approx((40 * 28.090984448 / cost, 40 * 28.090984448 / (cost + passes)))
    assert round(found.saving[0], 1) == 1.8
    found.whole().expect_to_fit(80)
    for name, row in (("8b", "Minitron 8B"), ("4b", "Minitron 4B")):
        cost = found.runs[name]
        hours = round(cost.flops / PEAK / cost.mfu / 3600, -2)
        [cells] = [line.split(" | ") for line in SHAPES.splitlines() if line.startswith(f"| {row}")]
        assert f"{hours:,.0f}" == cells[-2], "docs/guide/shapes.md prints the estimate"


SMALLER = {"hidden": 128, "ffn": 128, "heads": 4}
"""Divisor of the sizes."""
TRAINING = {"tokens": 4 * 8 * 16, "global_batch": 8, "micro_batch": 2, "warmup_steps": 1, "validate_every": 4}


def shrunk(name: str, folder: Path, material: Path) -> Path:
    """Return the preset with a tiny teacher of its family and tiny budgets, otherwise unchanged."""
    from transformers import AutoConfig, AutoModelForCausalLM

    recipe, about = yaml.safe_load((PRESETS / f"{name}.yaml").read_text()), CASES[name][0]
    sizes = {"hidden_size": about["hidden_size"] // 128, "intermediate_size": about["intermediate_size"] // 128}
    sizes |= {"num_attention_heads": about["num_attention_heads"] // 4, "num_key_value_heads": 2, "head_dim": 16}
    sizes |= {"num_hidden_layers": 4, "vocab_size": 131, "max_position_embeddings": 64}
    options = {key: value for key, value in (about | sizes).items() if key not in ("model_type", "rope_scaling")}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(about["model_type"], **options))
    model.save_pretrained(folder / "teacher")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        copy(material / "model" / file, folder / "teacher" / file)
    recipe |= {"model": str(folder / "teacher"), "out": str(folder / "run"), "dtype": "float32"}
    recipe["parallel"] = {"tp": 2, "sequence_parallel": True}
    recipe["data"] = {"sequence": 16, "sources": [{"path": str(material / "corpus.jsonl"), "validation": 0.2}]}
    keys = recipe["prune"]
    recipe["prune"] = {axis: size // SMALLER[axis] for axis, size in keys.items() if axis in SMALLER}
    if "layers" in keys:
        recipe["prune"]["layers"] = 2
        recipe["score"]["depth"]["metric"] = "loss"
    recipe["score"] |= {"samples": 8, "micro_batch": 2}
    recipe["distill"] |= TRAINING
    recipe["distill"].pop("start", None)
    if "correct" in recipe:
        recipe["correct"] |= TRAINING
    recipe["evaluate"] = {"samples": 8, "micro_batch": 2}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def work(topology: Topology, recipe: Path) -> None:
    run(load_recipe(recipe), topology)


@pytest.mark.parametrize("name", ["mn-minitron-8b", "llama-3.1-minitron-4b-depth"])
def test_a_preset_runs_through_every_stage(name: str, pool: Pool, material: Path, tmp_path: Path) -> None:
    recipe = shrunk(name, tmp_path, material)
    pool.run(work, recipe, tp=2, sequence_parallel=True)
    out = load_recipe(recipe).out
    rows = {row["model"]: row for row in read_json(out / "summary.json")}
    assert rows["distilled"]["parameters"] < rows["teacher"]["parameters"]
    assert ("corrected teacher" in rows) == ("correct" in yaml.safe_load(recipe.read_text()))
    assert (out / "export" / "config.json").is_file() and (out / "export" / "README.md").is_file()
