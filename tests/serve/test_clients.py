"""The table of clients equals the measurements; `estimate`, the model card and the export use it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.convert import folder_hash, read_config
from minitron_megatron.forecast import estimate
from minitron_megatron.layout import Shape
from minitron_megatron.model import ModelConfig
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe
from minitron_megatron.run import check_export, evaluate_folder, run
from minitron_megatron.run.handover import hand_over
from minitron_megatron.serve.clients import GAPS, client_notes, client_warnings, gaps
from minitron_megatron.testing import Pool
from tests.convert.conftest import make_folder
from tests.guide import ROOT
from tests.tiny import SHAPE

Write = Callable[..., Path]
LINES = [json.loads(line) for line in (ROOT / "benchmarks" / "results" / "clients.jsonl").read_text().splitlines()]
TOLERANCE = 1e-3
WHOLE = Shape(layers=2, hidden=384, ffn=256, heads=6, kv_groups=2, head_dim=64, vocab=512)
HIDDEN = {"whole": 384, "narrow": 192, "odd": 160}
"""Shapes of `tests/compat/clients.py`."""


# ---- what was measured


def outcome(line: dict[str, Any]) -> str:
    if "error" in line:
        return "error"
    return "equal" if line["difference"] is not None and line["difference"] < TOLERANCE else "wrong"


@pytest.mark.parametrize("client", sorted({line["client"] for line in LINES}))
def test_a_client_is_told_of_where_it_failed(client: str) -> None:
    """A client is listed for the families that it reads in some shape; wrong results are marked as silent."""
    found: dict[str, list[tuple[str, list[bool]]]] = {}
    for line in (each for each in LINES if each["client"] == client):
        family = "llama" if line["architecture"] == "auto" else line["family"]
        shape = replace(WHOLE, hidden=HIDDEN[line["shape"]], tied=line["tied"])
        silent = [gap.silent for gap in gaps(family, shape) if gap.client == client]
        found.setdefault(line["family"], []).append((outcome(line), silent))
    read = [each for lines in found.values() if any(how == "equal" for how, _ in lines) for each in lines]
    for how, silent in read:
        assert bool(silent) == (how != "equal"), found
        assert how != "wrong" or any(silent), found


def test_every_gap_was_measured() -> None:
    measured = {(line["client"], line["family"], outcome(line)) for line in LINES}
    told = {(gap.client, family, "wrong" if gap.silent else "error") for gap in GAPS for family in gap.families}
    assert told <= measured


# ---- what is said


def teacher(model_type: str, **sizes: Any) -> ModelConfig:
    return ModelConfig(replace(WHOLE, **sizes), source={"model_type": model_type})


def said(model_type: str, architecture: Any = "auto", **sizes: int) -> str:
    config = teacher(model_type)
    return " ".join(client_warnings(config, config.shape.resized(**sizes), architecture))


def test_warnings_name_the_clients_the_shape_and_what_to_do() -> None:
    moe = said("qwen2_moe", hidden=192)
    assert moe.startswith("transformers 4, llama.cpp and MLX-LM refuse a qwen2_moe with hidden size 192, which is not ")
    assert "heads x head_dim (6 x 64). vLLM gives wrong results for it, without an error. Choose hidden 384, or" in moe
    assert "MLX-LM refuses a mixtral with hidden size 192" in said("mixtral", hidden=192)
    assert "llama.cpp refuses a nemotron with hidden size 192" in said("nemotron", hidden=192)
    fewer = client_warnings(teacher("mixtral", hidden=192), replace(WHOLE, hidden=128), "auto")
    assert "Choose fewer heads, or serve it with another client." in fewer[0]


def test_nothing_is_said_of_what_every_client_reads() -> None:
    for family in ("llama", "mistral", "qwen2", "qwen3", "nemotron", "phi3", "mixtral", "qwen2_moe", "qwen3_moe"):
        assert said(family) == "" and client_notes(teacher(family), WHOLE, "auto") == ()
    assert said("qwen3", hidden=192) == "" == said("mistral", hidden=160)


def test_a_qwen2_is_told_of_as_what_it_is_exported() -> None:
    assert said("qwen2", hidden=192) == ""
    own, odd = said("qwen2", "own", hidden=192), said("qwen2", hidden=160)
    assert "a qwen2 with hidden size 192" in own and "Set `architecture` to auto" in own
    assert "a qwen2 with hidden size 160" in odd and "Choose hidden 156 or 162, which is exported as a Llama" in odd


# ---- a run


@pytest.fixture(scope="module")
def qwen2(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen2") / "model"
    make_folder(folder, "qwen2", vocab_size=SHAPE.vocab, hidden_size=48, num_attention_heads=4, head_dim=12)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(material / "model" / name, folder / name)
    return folder


def run_and_read(topology: Topology, recipe_path: Path, to: Path) -> tuple[float, dict[str, Any]]:
    recipe = load_recipe(recipe_path)
    run(recipe, topology)
    hand_over(recipe, topology, to)
    apart = check_export(recipe, topology)
    return apart, evaluate_folder(recipe, topology, recipe.out / "export")


def test_a_pruned_qwen2_is_exported_as_a_llama_that_every_verb_reads(
    pool: Pool, recipe_file: Write, qwen2: Path, tmp_path: Path
) -> None:
    keys: dict[str, Any] = {
        "model": str(qwen2),
        "correct": None,
        "random_baseline": None,
        "export": {"dtype": "float32"},
    }
    keys["distill"] = {"tokens": 2 * 8 * 16, "global_batch": 8, "micro_batch": 4, "warmup_steps": 1}
    keys |= {"score": {"samples": 8}, "evaluate": {"samples": 8, "micro_batch": 4}}
    path = recipe_file(prune={"hidden": 32, "ffn": 48}, **keys)
    assert estimate(load_recipe(path)).warnings == ()
    assert estimate(load_recipe(path, ["export.architecture=own"])).warnings != ()
    apart, row = pool.run(run_and_read, path, tmp_path / "handed")[0]
    out = load_recipe(path).out
    summary = {each["model"]: each for each in json.loads((out / "summary.json").read_text())}
    assert apart < 1e-3
    assert row["loss_nats_per_token"] == pytest.approx(summary["distilled"]["loss_nats_per_token"], rel=1e-6)
    for folder in (out / "export", tmp_path / "handed"):
        config = json.loads((folder / "config.json").read_text())
        assert (config["architectures"], config["attention_bias"]) == (["LlamaForCausalLM"], True)
        assert folder_hash(folder) == folder_hash(out / "distilled")
    assert read_config(out / "distilled").source["model_type"] == "qwen2"
    assert read_config(out / "export").shape == read_config(out / "distilled").shape
