"""Losses right after the cut, from one teacher, equal those of transformers on each candidate's own folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_megatron.convert import load_hf, save_hf
from minitron_megatron.data import Batch
from minitron_megatron.errors import PlanError
from minitron_megatron.layout import Shape, parameters
from minitron_megatron.model import named_shards, shape_of
from minitron_megatron.parallel import Topology
from minitron_megatron.prune import random_plan, trim
from minitron_megatron.records import Plan
from minitron_megatron.search import zero_shot
from minitron_megatron.testing import LivePeak, Pool
from tests.convert.conftest import hf_folder
from tests.tiny import SHAPE, checkpoints, cross_entropy, samples, transformer

__all__ = ["checkpoints", "hf_folder"]

SIZES: dict[str, dict[str, Any]] = {
    "wide": {"ffn": 48},
    "narrow": {"hidden": 32, "ffn": 32, "heads": 4},
    "shallow": {"layers": (0, 2, 4), "hidden": 40},
    "short": {"layers": (1, 2, 3, 4)},
}
EXPERTS = {"fewer": {"experts": 2}, "thinner": {"expert_ffn": 12, "hidden": 32}}


def plan_of(shape: Shape, name: str) -> Plan:
    return random_plan(shape, 3, **(SIZES | EXPERTS)[name])


def batches(count: int = 8) -> list[Batch]:
    every = samples(count, seed=5)
    parts = (every.tokens, every.labels, every.mask)
    return [Batch(*(part[at : at + 2] for part in parts)) for at in range(0, count, 2)]


def measured(topology: Topology, folder: Path, names: list[str]) -> tuple[dict[str, Any], bool, list[str]]:
    """Return (losses, whether the teacher is unchanged, candidates reported on this rank)."""
    model, reported = load_hf(folder, topology), []
    before = {(shard.name, shard.tied_copy): shard.tensor.detach().clone() for shard in named_shards(model)}
    shape = shape_of(model[0])
    found = zero_shot(
        model,
        names,
        lambda name: plan_of(shape, name),
        batches(),
        topology=topology,
        tell=lambda name, _: reported.append(name),
    )
    same = all(torch.equal(shard.tensor, before[shard.name, shard.tied_copy]) for shard in named_shards(model))
    return {name: part["loss"] for name, part in found.items()}, same, reported


def cut_and_written(topology: Topology, folder: Path, out: Path) -> None:
    for name in SIZES:
        model = load_hf(folder, topology)
        save_hf(trim(model, plan_of(shape_of(model[0]), name), topology), out / name, topology)


@pytest.fixture(scope="module")
def truth(pool: Pool, checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return kind -> candidate -> nats per token, by transformers."""
    every, found = samples(8, seed=5), {}
    for kind in ("untied", "tied"):
        out = tmp_path_factory.mktemp(kind)
        pool.run(cut_and_written, checkpoints[kind], out)
        with torch.no_grad():
            found[kind] = {name: float(cross_entropy(transformer(out / name), every)) for name in SIZES}
    return found


LAYOUTS = [{}, {"tp": 2, "sequence_parallel": True}, {"pp": 2, "vp": 2}, {"tp": 2, "pp": 2}, {"dp": 2}]
CASES = [("untied", layout) for layout in LAYOUTS] + [("tied", {"pp": 2}), ("tied", {"tp": 2, "dp": 2})]


@pytest.mark.parametrize(("kind", "layout"), CASES, ids=str)
def test_losses_are_those_of_each_candidate_on_its_own(
    pool: Pool, checkpoints: dict[str, Path], truth: dict[str, Any], kind: str, layout: dict[str, Any]
) -> None:
    names = [name for name in SIZES if name != "shallow" or layout.get("vp", 1) == 1]  # three layers, four stages
    results = pool.run(measured, checkpoints[kind], names, **layout)
    for losses, same, _ in results:
        assert same
        assert losses == pytest.approx({name: truth[kind][name] for name in names}, abs=1e-5)
    reported = [name for _, _, names in results for name in names]
    assert sorted(reported) == sorted(names)  # each on one rank


@pytest.mark.parametrize("layout", [{"dp": 2}, {"ep": 2, "dp": 2}, {"tp": 2, "sequence_parallel": True}], ids=str)
def test_experts_are_measured_however_they_are_spread(
    pool: Pool, hf_folder: Callable[[str], Path], layout: dict[str, Any]
) -> None:
    folder = hf_folder("qwen2_moe")
    expected = pool.run(measured, folder, list(EXPERTS))[0][0]
    results = pool.run(measured, folder, list(EXPERTS), **layout)
    assert len({*expected.values()}) == 2
    for losses, same, _ in results:
        assert same and losses == pytest.approx(expected, abs=1e-5)


def peak(topology: Topology, folder: Path) -> tuple[int, int]:
    """Return (peak live bytes above the teacher, bytes of the largest candidate)."""
    model = load_hf(folder, topology)
    names, few = ["thin", "thinner", "thin"], batches(2)
    few = [Batch(few[0].tokens[:1, :4], few[0].labels[:1, :4], few[0].mask[:1, :4])]
    plans = {"thin": random_plan(SHAPE, 1, ffn=60, hidden=44), "thinner": random_plan(SHAPE, 2, ffn=56, hidden=40)}
    with LivePeak() as meter:
        zero_shot(model, names, plans.__getitem__, few, topology=topology)
    return meter.extra, 4 * parameters(plans["thin"].target)


def test_one_candidate_is_in_memory_at_a_time(pool: Pool, checkpoints: dict[str, Path]) -> None:
    extra, largest = pool.run(peak, checkpoints["untied"])[0]
    assert 0.9 * largest < extra < 1.2 * largest


def foreign(topology: Topology, folder: Path) -> None:
    model = load_hf(folder, topology)
    zero_shot(model, ["x"], lambda _: random_plan(SHAPE, 1, ffn=8), batches(2), topology=topology)


def test_plans_for_another_model_are_refused(pool: Pool, checkpoints: dict[str, Path]) -> None:
    with pytest.raises(PlanError, match="the plan cuts another model: this one has"):
        pool.run(foreign, checkpoints["tied"], dp=2)


def broken(topology: Topology, folder: Path) -> dict[str, Any]:
    model = load_hf(folder, topology)
    next(shard for shard in named_shards(model) if shard.name.endswith("linear_fc1.weight")).tensor.data[0] = torch.nan
    found = zero_shot(model, ["wide", "short"], lambda name: plan_of(SHAPE, name), batches(4), topology=topology)
    return dict(found)


def test_a_loss_that_is_not_finite_is_none(pool: Pool, checkpoints: dict[str, Path]) -> None:
    found = pool.run(broken, checkpoints["untied"])[0]
    assert found["wide"]["loss"] is None and found["short"]["loss"] > 0  # layer 0 alone is broken
