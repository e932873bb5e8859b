"""Every stage, option and layout runs on a rehearsed GPU, with the bytes and traffic that it is known by."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from shutil import copy
from typing import Any

import pytest
import yaml

from minitron_megatron.errors import TopologyError
from minitron_megatron.layout import Shape, lookup
from minitron_megatron.recipe import Recipe
from tests.convert.conftest import make_folder
from tests.recipes import tiny_recipe
from tests.rehearsal import scenes
from tests.rehearsal.golden import NAMES, first_rank
from tests.rehearsal.steps import TEACHER
from tests.tiny import SHAPE

Call = Callable[..., Any]
STUDENT_HIDDEN = 32
STATES = '{"outputs": ["2:1"], "embedding": true, "attention": ["4:3"]}'
MIXTURE = {"hidden": 32, "kv_groups": 2, "heads": 2, "experts": 4, "expert_ffn": 16, "shared_ffn": 8, "layers": [0, 2]}
SHORT = ["distill.micro_batch=4", "correct.micro_batch=4", "evaluate.samples=8", "evaluate.micro_batch=4"]
GOLDEN = Path(__file__).with_name("presets.json")


@pytest.fixture(scope="module")
def apart() -> Iterator[Call]:
    """Function that calls another one in a process that rehearses."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=scenes.settle) as worker:
        yield lambda function, *args: worker.submit(function, *args).result()


@pytest.fixture(scope="module")
def recipe(material: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rehearsal") / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(material) | {"out": str(path.parent / "run"), "dtype": "bfloat16"}))
    return path


@pytest.fixture(scope="module")
def stage(apart: Call, recipe: Path) -> Call:
    """Function: overrides, GPUs, stage -> JSON of the last kind of rank."""

    @cache
    def rehearsed(*overrides: str, gpus: int = 1, stage: str = "distill") -> dict[str, Any]:
        return dict(apart(scenes.rehearsed_stage, recipe, [*SHORT, *overrides], gpus, stage))

    return rehearsed


def test_distillation_with_each_option(stage: Call) -> None:
    plain = stage()
    assert max(size for _, size in plain["bytes_over_seconds"]) == plain["peak_bytes"]
    assert sum(plain["seconds_by_line"].values()) == pytest.approx(sum(plain["seconds"].values()))
    kinds = plain["peak_bytes_by_kind"]
    correct = stage(stage="correct")["peak_bytes_by_kind"]

    both = stage("correct.continuous=true")["peak_bytes_by_kind"]
    for kind in ("gradients", "optimizer"):
        assert both[kind] == pytest.approx(kinds[kind] + correct[kind], abs=512)  # padding between its buckets

    moved = stage("distill.offload_teacher=true")
    freed = kinds["teacher"] - moved["peak_bytes_by_kind"]["teacher"]
    assert plain["peak_bytes"] - moved["peak_bytes"] == freed > 0.8 * kinds["teacher"]

    states = stage(f"distill.states={STATES}")
    assert states["flops"] > plain["flops"] and states["peak_bytes_by_kind"]["teacher"] > kinds["teacher"]

    apart = stage("data.cross_documents=false")
    assert apart["flops"] == plain["flops"] and apart["kernels"] > plain["kernels"]

    chats = stage("distill.objective=cross_entropy", "data.cross_documents=false")
    assert "teacher" not in chats["peak_bytes_by_kind"] and chats["flops"] < plain["flops"]


def test_a_window_holds_fewer_of_the_teachers_states(stage: Call) -> None:
    all_at_once, windowed = (stage("distill.micro_batch=2", *more) for more in ([], ["distill.teacher_window=1"]))
    held = [each["peak_bytes_by_kind"]["teacher"] for each in (all_at_once, windowed)]
    states = 2 * 16 * SHAPE.hidden * 2  # a micro-batch of 2 samples of 16 tokens, in bf16
    assert held[0] - held[1] == 3 * states
    assert windowed["flops"] == all_at_once["flops"]


def test_a_cut_and_its_refit_are_a_stage(stage: Call) -> None:
    """A refit runs both models on the calibration samples, and solves in float64; its equations do not grow with the
    samples, so that few micro-batches tell what many cost."""
    cut, few, many = (
        stage("prune.by=importance", *more, stage="prune", gpus=2)
        for more in ([], *(["prune.refit=outputs", f"prune.refit_samples={samples}"] for samples in (16, 64)))
    )
    assert cut["flops"] == 0 < few["flops"] < many["flops"] < 4 * few["flops"]
    assert cut["peak_bytes"] < few["peak_bytes"] <= many["peak_bytes"] < 1.1 * few["peak_bytes"]


def test_a_search_measures_every_candidate_on_all_samples(stage: Call) -> None:
    """A grid of two candidates takes twice one's work, or what one takes where each of two replicas has one; all
    replicas measure those that are refitted together."""
    sizes = ("prune={}", "score.samples=32", "score.micro_batch=2")
    one, two = (
        f"search={{hidden: [{hidden}], ffn: [64], budget: {{params: 97000}}, light: null}}"
        for hidden in ("32", "40, 32")
    )
    few, many = (stage(*sizes, keys, stage="search") for keys in (one, two))
    shared = stage(*sizes, two, stage="search", gpus=2)
    together = stage(*sizes, two, "prune.refit=outputs", "prune.refit_samples=8", stage="search", gpus=2)
    assert many["flops"] > 2 * few["flops"] > 0  # the rehearsed one is the largest
    assert together["flops"] == many["flops"]
    assert shared["flops"] == many["flops"] / 2 and shared["peak_bytes"] == many["peak_bytes"]


def test_an_export_brings_all_weights_to_the_rank_that_writes(stage: Call) -> None:
    split = ("parallel.tp=2", "parallel.sequence_parallel=true")
    alone, reader = stage(stage="export"), stage(*split, stage="export", gpus=2)
    assert alone["flops"] == reader["flops"] == 0
    assert sum(alone["host_waits"].values()) > 0 == sum(reader["host_waits"].values())  # the last rank only sends
    assert reader["communication"] and not alone["communication"]


def test_a_generated_token_costs_as_much_as_another(stage: Call) -> None:
    """Half of each sequence is generated, in rows of `evaluate.micro_batch`."""
    keys = ("data.sequence=64", "correct=null", "distill.warmup_steps=1")
    few, many = (stage(*keys, f"evaluate.micro_batch={rows}", stage="generate") for rows in (1, 4))
    assert few["flops"] == pytest.approx(many["flops"] / 4, rel=0.01)
    assert few["peak_bytes"] < many["peak_bytes"]
    assert few["kernels"] > 20 * 32


@pytest.mark.parametrize("tp, pp", [(2, 1), (1, 2), (2, 2)])
def test_a_search_an_export_and_generation_are_split_over_tp_and_pp(stage: Call, tp: int, pp: int) -> None:
    split = (f"parallel.tp={tp}", f"parallel.sequence_parallel={str(tp > 1).lower()}", f"parallel.pp={pp}")
    search = ("prune={}", "search={hidden: [32], ffn: [64], budget: {params: 97000}, light: null}")
    short = ("data.sequence=64", "correct=null", "distill.warmup_steps=1", "evaluate.micro_batch=4")
    for name, keys in {"search": search, "export": (), "generate": short}.items():
        whole, part = stage(*keys, stage=name), stage(*keys, *split, gpus=tp * pp, stage=name)
        assert part["peak_bytes"] < whole["peak_bytes"] and part["communication"]
        assert part["flops"] < whole["flops"] or name == "export"


@pytest.mark.parametrize("tp, pp", [(2, 1), (1, 2), (2, 2)])
def test_a_refit_is_split_over_tp_and_pp(stage: Call, tp: int, pp: int) -> None:
    keys = ("prune.refit=outputs", "prune.refit_samples=16")
    split = (f"parallel.tp={tp}", f"parallel.sequence_parallel={str(tp > 1).lower()}", f"parallel.pp={pp}")
    whole, part = stage(*keys, stage="prune"), stage(*keys, *split, gpus=tp * pp, stage="prune")
    assert 0 < part["flops"] < whole["flops"] and part["peak_bytes"] < whole["peak_bytes"]


def test_lora_trains_its_adapters_alone(stage: Call) -> None:
    whole, adapters = (
        stage(*trained, stage="correct")["peak_bytes_by_kind"] for trained in ([], ["correct.parameters=lora"])
    )
    assert adapters["weights"] > whole["weights"] and adapters["gradients"] < whole["gradients"] / 2
    assert adapters["optimizer"] < whole["optimizer"] / 2


def test_layouts_talk_as_they_should(stage: Call) -> None:
    alone = stage()
    shared = stage("parallel.cp=2", "parallel.tp=2", "parallel.sequence_parallel=true", gpus=4)
    assert 0.2 < shared["flops"] / alone["flops"] <= 0.25
    assert {"_allgather_base in 2", "_reduce_scatter_base in 2"} <= set(shared["communication"])
    interleaved = stage("parallel.pp=2", "parallel.vp=2", "distill.micro_batch=2", "evaluate.micro_batch=2", gpus=2)
    sent, received = (interleaved["communication"][f"{way} in 2"]["bytes"] for way in ("send", "recv"))
    states = 2 * 16 * 2 * (SHAPE.hidden + 2 * STUDENT_HIDDEN)  # of the teacher once, of the student there and back
    assert sent + received == 4 * states * 3  # micro-batches; borders between two ranks with two chunks each


@pytest.mark.parametrize("stage_name", ["distill", "score"])
def test_experts_are_exchanged(stage_name: str, stage: Call, material: Path, tmp_path: Path) -> None:
    model = make_folder(
        tmp_path / "model", "qwen2_moe", vocab_size=SHAPE.vocab, hidden_size=48, num_attention_heads=4, num_experts=8
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        copy(material / "model" / name, model / name)
    found = stage("parallel.ep=2", f"model={model}", f"prune={json.dumps(MIXTURE)}", gpus=2, stage=stage_name)
    assert found["communication"]["alltoall_base in 2"]["bytes"] > 0


def _largest(shape: Shape) -> int:
    """Return the bytes of the largest parameter in bf16."""
    return 2 * max(_numel(lookup(name).shape(shape.sizes())) for name in shape.names())


def _numel(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 1 else shape[0] * shape[1]


@pytest.mark.parametrize(("name", "parameters"), [("prune", 1), ("export", 2)])
def test_pruning_and_export_hold_little_more(name: str, parameters: int, apart: Call) -> None:
    """Pruning holds one parameter more than the model; export a whole one, and a Hugging Face tensor made of it."""
    before, section = apart(scenes.in_room, name)
    assert 0 <= section.peak - before <= parameters * _largest(TEACHER)
    assert sum(section.flops.values()) == 0
    assert bool(section.sent) == (name == "export")


@pytest.mark.parametrize("name", ["refit", "score", "search", "align by dpo", "align by rpo_bwd_kl"])
def test_rooms_run(name: str, apart: Call) -> None:
    before, section = apart(scenes.in_room, name)
    assert section.peak > before and sum(section.flops.values()) > 0 and sum(section.sent.values()) > 0


def test_the_smallest_change_that_fits_is_named(apart: Call, recipe: Path, stage: Call) -> None:
    def advised(memory: float, *overrides: str) -> str:
        return str(apart(scenes.advised, recipe, [*SHORT, *overrides], 1, memory))

    assert advised(1e-6, "distill.micro_batch=1", "recompute=full").startswith("No single change fits")
    for change, overrides in (("distill.micro_batch: 2", []), ("recompute: selective", ["distill.micro_batch=1"])):
        advice = advised((stage(*overrides)["peak_bytes"] - 1) / 2**30, *overrides)
        assert advice == f"The smallest change that fits: {change} (0.00 GiB, modelled, not measured)."


def test_a_plan_rehearses_the_best_layouts_and_writes_the_keys_of_the_fastest(apart: Call, recipe: Path) -> None:
    found = apart(scenes.planned_layouts, recipe, ["parallel.tp=2", *SHORT], 2, 1.0)
    names, seconds = [name for name, _, _ in found], [each for _, _, each in found]
    assert 2 <= len(found) <= 5 and seconds == sorted(seconds) and len(set(names)) == len(names)
    assert "tp 2, micro-batch 4" in names  # the recipe's own
    keys = yaml.safe_load(found[0][1])
    written = yaml.safe_load(recipe.read_text()) | {"parallel": keys["parallel"], "recompute": keys["recompute"]}
    assert Recipe.model_validate(written).parallel.tp == keys["parallel"].get("tp", 1)
    with pytest.raises(
        TopologyError, match=r"No layout of 2 GPUs with 1e-06 GiB was found that fits .*\. Give more GPUs, or"
    ):
        apart(scenes.planned_layouts, recipe, SHORT, 2, 1e-6)


def test_a_preset_has_its_numbers(apart: Call) -> None:
    """To the byte, at full size as one of 256 ranks; `benchmarks/rehearse_presets.py --golden` writes all anew."""
    name = "llama-3.1-minitron-4b-depth"
    known = json.loads(GOLDEN.read_text())
    assert apart(first_rank, name, ["evaluate.suite=null"]).items() <= known[name].items()
    assert set(known) == set(NAMES) and all(len(each) == 2 for each in known.values())  # first and last of tp
