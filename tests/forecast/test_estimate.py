"""Estimates of a recipe compared with measurements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from minitron_megatron.convert import load_hf
from minitron_megatron.distill import KDObjective
from minitron_megatron.events import Event
from minitron_megatron.forecast import Estimate, estimate
from minitron_megatron.forecast.memory import model_bytes, rank_parameters, training_parts
from minitron_megatron.layout import Shape, parameters
from minitron_megatron.model import ModelConfig, build
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe
from minitron_megatron.run import run
from minitron_megatron.testing import LivePeak, Pool
from minitron_megatron.train import LMObjective, Training, train
from tests.tiny import LAYOUTS, SEQUENCE, SHAPE, samples, share, write_llama

Write = Callable[..., Path]
MIXTURE = replace(SHAPE, ffn=0, experts=4, experts_per_token=2, expert_ffn=24, shared_ffn=16, shared_gate=True)
MIXED = ({"ep": 2, "dp": 2}, {"tp": 2, "ep": 2, "sequence_parallel": True}, {"ep": 2, "pp": 2, "dp": 2})
CASES: list[tuple[Shape, dict[str, Any]]] = [
    *((shape, layout) for shape in (SHAPE, replace(SHAPE, tied=True)) for layout in LAYOUTS.values()),
    *((MIXTURE, layout) for layout in MIXED),
]


def held(topology: Topology, shape: Shape) -> tuple[int, int, int]:
    """Return (pipeline stage, non-expert parameters, expert parameters) of this rank."""
    named = [each for chunk in build(ModelConfig(shape), topology) for each in chunk.named_parameters()]
    experts = sum(weight.numel() for name, weight in named if ".local_experts." in name)
    return topology.pp_rank, sum(weight.numel() for _, weight in named) - experts, experts


@pytest.mark.parametrize(("shape", "layout"), CASES, ids=str)
def test_a_rank_holds_the_parameters_that_are_counted(pool: Pool, shape: Shape, layout: dict[str, Any]) -> None:
    counted = rank_parameters(shape, Topology(**{key: value for key, value in layout.items() if key != "dp"}))
    for stage, dense, experts in pool.run(held, shape, **layout):
        assert counted[stage] == (dense, experts)


def test_without_splitting_a_rank_holds_the_padded_model() -> None:
    assert rank_parameters(SHAPE, Topology()) == [(parameters(replace(SHAPE, vocab=SHAPE.padded_vocab)), 0)]


def alive(topology: Topology, folder: Path, dtype: torch.dtype) -> int:
    """Return the bytes of this rank's tensors after a training step, without those that existed before."""

    def count(event: Event | None = None) -> None:
        with LivePeak() as meter:
            counts.append(meter.start)

    counts: list[int] = []
    count()
    model, batches = load_hf(folder, topology, dtype), share(samples(8), topology)
    train(model, LMObjective(topology), lambda step: batches, Training(steps=1), topology, listener=count)
    return counts[1] - counts[0]


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}, {"dp": 2}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_holds_the_bytes_that_are_predicted(
    pool: Pool, material: Path, dtype: str, layout: dict[str, int]
) -> None:
    topology = Topology(**{key: value for key, value in layout.items() if key != "dp"})
    world = max(layout.values(), default=1)
    predicted = [sum(parts.values()) for parts in training_parts(SHAPE, topology, dtype, world)]
    for rank, found in enumerate(pool.run(alive, material / "model", getattr(torch, dtype), **layout)):
        assert found == pytest.approx(predicted[rank if "pp" in layout else 0], rel=0.03)


def step_flops(topology: Topology, teacher: Path, student: Path) -> int:
    """Return torch's FLOPs of a distillation step: all matrix products, but no attention on the CPU."""

    def in_place(total: Any, one: Any, other: Any, *_: Any, **__: Any) -> int:
        return 2 * one[0] * one[1] * other[1]

    teaches, learns = load_hf(teacher, topology), load_hf(student, topology)
    objective = KDObjective(teaches, topology, vocab=SHAPE.vocab)
    batches = share(samples(8, padded=False), topology)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: in_place}) as counter:
        train(learns, objective, lambda step: batches, Training(steps=1), topology)
    return counter.get_total_flops()


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"dp": 2}], ids=str)
def test_a_step_of_distillation_takes_the_flops_that_are_predicted(
    recipe_file: Write, pool: Pool, material: Path, tmp_path: Path, layout: dict[str, int]
) -> None:
    """One step of 8 samples. Attention is left out here; `tests/layout` compares its FLOPs with torch's."""
    student = SHAPE.resized(hidden=32, ffn=48, heads=4, layers=4)
    counted = pool.run(step_flops, material / "model", write_llama(tmp_path / "student", student, seed=2), **layout)
    keys = {"tokens": 8 * SEQUENCE, "global_batch": 8, "warmup_steps": 0}
    recipe = recipe_file(distill=keys, prune={"hidden": 32, "ffn": 48, "heads": 4, "layers": [0, 1, 3, 4]})
    found = estimate(load_recipe(recipe, [f"data.sequence={SEQUENCE}"]))

    def attention(shape: Shape) -> int:
        return 8 * SEQUENCE * 2 * shape.layers * shape.heads * shape.head_dim * SEQUENCE

    assert (found.student, found.distill_tokens) == (student, 8 * SEQUENCE)
    assert sum(counted) == found.stage_flops["distill"] - attention(SHAPE) - 3 * attention(student)
    assert found.teacher_flops - attention(SHAPE) == 8 * SEQUENCE * 2 * parameters_of_products(SHAPE)


def parameters_of_products(shape: Shape) -> int:
    """Return the parameters of a Llama's linear layers and output layer."""
    heads = 2 * shape.heads + 2 * shape.kv_groups
    return shape.layers * shape.hidden * (heads * shape.head_dim + 3 * shape.ffn) + shape.vocab * shape.hidden


def test_a_llama_that_transformers_refuses_is_told_of(recipe_file: Write) -> None:
    with pytest.raises(Exception, match="not a multiple of the number of attention heads"):
        LlamaConfig(hidden_size=42, num_attention_heads=4, head_dim=8)
    [said] = estimate(load_recipe(recipe_file(prune={"hidden": 42, "heads": 4}))).warnings
    assert "hidden size 42, which is not a multiple of its 4 heads. Choose hidden 40 or 44, or load" in said
    assert estimate(load_recipe(recipe_file(prune={"hidden": 40, "heads": 4}))).warnings == ()


def warned(topology: Topology, recipe: Path) -> list[str]:
    """Return the warnings of a run on this rank."""
    with catch_warnings(record=True) as caught:
        simplefilter("always")
        run(load_recipe(recipe), topology, only="prepare")
    return [str(warning.message) for warning in caught if "transformers" in str(warning.message)]


def test_a_run_warns_of_it_once(recipe_file: Write, pool: Pool) -> None:
    recipe = recipe_file(prune={"hidden": 46, "heads": 8})
    first, second = pool.run(warned, recipe, dp=2)
    assert len(first) == 1 and "Choose hidden 40 or 48, or load" in first[0] and second == []


def test_a_corrected_teacher_in_training_may_be_the_most_that_a_rank_holds(recipe_file: Write) -> None:
    """In fp32 correction takes 16 bytes per parameter; distillation takes 4 for the teacher and 16 for the student."""
    recipe = load_recipe(recipe_file(prune={"layers": [0]}))
    found, alone = estimate(recipe), estimate(recipe.model_copy(update={"correct": None}))
    padded = {shape: parameters(replace(shape, vocab=shape.padded_vocab)) for shape in (found.teacher, found.student)}
    teacher, student = padded[found.teacher], padded[found.student]
    assert found.rank_bytes == 16 * teacher
    assert alone.rank_bytes == 4 * teacher + 16 * student + alone.stash_bytes < found.rank_bytes


def test_bytes_are_told_by_rank_and_kind(recipe_file: Write) -> None:
    """Pipeline stages that hold equally much are told once; the last one also has the teacher's hidden states."""
    found = estimate(load_recipe(recipe_file(), ["parallel.pp=4", "correct=null"]), gpus=8)
    rows = found.rank_rows()
    assert [*rows] == [
        "ranks 0 to 1, pipeline stage 1 of 4, in distill",
        "ranks 2 to 5, pipeline stages 2 to 3 of 4, in distill",
        "ranks 6 to 7, pipeline stage 4 of 4, in distill",
    ]
    first, middle, last = rows.values()
    students = rank_parameters(found.student, Topology(pp=4))
    assert middle["student's weights"] == middle["student's gradients"] == 4 * students[1][0]
    assert first["student's optimizer"] == 8 * students[0][0] // 2, "data-parallel ranks share it"
    assert last["teacher's hidden states"] == found.stash_bytes and "teacher's hidden states" not in first
    assert found.rank_bytes == max(sum(held.values()) for held in rows.values())


def test_what_makes_the_teacher_lighter_is_counted(recipe_file: Write) -> None:
    def counted(*keys: str) -> Estimate:
        return estimate(load_recipe(recipe_file(), ["correct=null", *(f"distill.{key}" for key in keys)]))

    plain, packed, windowed = counted(), counted("teacher_dtype=float8"), counted("teacher_window=1")
    shape = plain.teacher
    attention, mlp = 2 * (shape.heads + shape.kv_groups) * shape.head_dim, 3 * shape.ffn
    assert plain.rank_bytes - packed.rank_bytes == 3 * shape.layers * shape.hidden * (attention + mlp)
    recipe = load_recipe(recipe_file())
    of_one = recipe.distill.micro_batch * recipe.data.sequence * shape.hidden * 4
    assert windowed.stash_bytes == of_one < plain.stash_bytes
    assert windowed.rank_bytes == plain.rank_bytes - plain.stash_bytes + of_one


@pytest.mark.parametrize(("parameters", "weights"), [("norms", 1), ("lora", 2)])
def test_a_correction_of_less_than_everything_takes_less(recipe_file: Write, parameters: str, weights: int) -> None:
    keys = ["prune.layers=[0]", "distill.global_batch=2", "distill.micro_batch=2", f"correct.parameters={parameters}"]
    found = estimate(load_recipe(recipe_file(), keys))
    padded = model_bytes(found.teacher, Topology(), "float32")[0]
    smaller = padded + sum(training_parts(found.student, Topology(), "float32", 1)[0].values()) + found.stash_bytes
    assert found.rank_bytes == max(weights * padded, smaller)
