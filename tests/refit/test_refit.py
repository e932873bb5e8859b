"""The whole refit against the naive one, at every layout; and its results where there is little or nothing to fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_megatron.convert import load_hf, read_config, save_hf
from minitron_megatron.errors import DataError, PlanError
from minitron_megatron.model import named_shards
from minitron_megatron.parallel import Topology
from minitron_megatron.prune import random_plan, trim
from minitron_megatron.records import Plan
from minitron_megatron.refit import SharedMoments, SiteFit, refit, shared_sites
from minitron_megatron.refit.refit import _check
from minitron_megatron.testing import Pool
from tests.convert.conftest import make_folder
from tests.refit.truth import Naive
from tests.tiny import CONTEXT, LAYOUTS, SHAPE, cross_entropy, samples, share

SAMPLES = 44
CUTS: dict[str, dict[str, Any]] = {
    "llama": {"layers": (0, 1, 2, 4), "hidden": 24, "ffn": 40, "heads": 2},  # at pp 2 a layer's teacher is elsewhere
    "qwen3": {"hidden": 24, "heads": 2},
    "nemotron": {"layers": (1, 2), "hidden": 32, "ffn": 40},
    "qwen3_moe": {"hidden": 32, "experts": 2, "expert_ffn": 16},
    "llama, hidden whole": {"layers": (0, 1, 2, 4), "ffn": 40},  # fc2 by the teacher's moments
    "nemotron, hidden whole": {"heads": 2, "ffn": 40},  # proj by them
    "qwen3_moe, hidden whole": {"heads": 2, "experts": 2},
}
CASES = [
    *(("llama", "sequential", layout) for layout in LAYOUTS if layout not in ("tp2", "pp2")),
    ("llama", "outputs", "pp2"),
    ("qwen3", "outputs", "tp2"),
    ("nemotron", "sequential", "tp2-sp"),
    ("qwen3_moe", "sequential", "ep2"),
    ("qwen3_moe", "outputs", "ep2-tp2-sp"),
    *(("llama, hidden whole", "outputs", layout) for layout in ("tp1", "tp2-sp", "pp2-vp2", "tp2-pp2", "dp2")),
    ("nemotron, hidden whole", "outputs", "tp2-pp2"),
    ("llama", "sequential", "cp2-tp2-sp"),
    ("llama, hidden whole", "outputs", "cp2-dp2"),
    ("qwen3_moe, hidden whole", "outputs", "ep2"),
]
EXPERTS = {"ep2": {"dp": 2, "ep": 2}, "ep2-tp2-sp": {"tp": 2, "ep": 2, "sequence_parallel": True}}


@dataclass(frozen=True)
class Case:
    teacher: Path
    plan: Plan
    want: dict[str, Tensor]
    loss: float


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, pool: Pool) -> Callable[[str, str], Case]:
    """(family, method) -> a teacher, a cut of it and the naive truth; each made once."""
    root, made = tmp_path_factory.mktemp("refit"), dict[tuple[str, str], Case]()

    def make(family: str, method: str) -> Case:
        if (family, method) not in made:
            made[family, method] = naive(root, family, method, pool)
        return made[family, method]

    return make


def naive(root: Path, family: str, method: str, pool: Pool) -> Case:
    from transformers import AutoModelForCausalLM

    kind, student = family.partition(",")[0], root / f"{family}-{method}"
    folder = root / kind
    if not folder.exists():
        make_folder(
            folder, {"qwen3": "qwen3-tied"}.get(kind, kind), **({"num_hidden_layers": 5} if kind == "llama" else {})
        )
    plan = random_plan(read_config(folder).shape, 3, **CUTS[family])
    pool.run(cut, folder, plan, student)
    models = [AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32).eval() for each in (student, folder)]
    every = samples(SAMPLES)
    Naive(models[0], models[1], plan, every.tokens, every.mask, method)
    with torch.no_grad():
        loss = cross_entropy(models[0], samples(8, seed=9)).item()
    return Case(folder, plan, dict(models[0].state_dict()), loss)


def cut(topology: Topology, folder: Path, plan: Plan, to: Path) -> None:
    save_hf(trim(load_hf(folder, topology, torch.float32), plan, topology), to, topology, files_from=folder)


def repaired(topology: Topology, folder: Path, plan: Plan, method: Any, to: Path) -> list[SiteFit]:
    """Cuts, refits and writes a student; from the teacher's moments, where refits of two such cuts share them."""
    teacher = load_hf(folder, topology, torch.float32)
    student = trim(load_hf(folder, topology, torch.float32), plan, topology)
    batches, sites = share(samples(SAMPLES), topology, 11), shared_sites(method, plan.shape, [plan.target] * 2)
    shared = SharedMoments(teacher, batches, topology, sites) if sites else None
    fits = refit(student, teacher, plan, batches, topology, method=method, shared=shared)
    save_hf(student, to, topology, files_from=folder)
    return fits


@pytest.mark.parametrize(("family", "method", "layout"), CASES)
def test_every_layout_gives_the_naive_refit(
    pool: Pool, case: Callable[[str, str], Case], tmp_path: Path, family: str, method: str, layout: str
) -> None:
    from transformers import AutoModelForCausalLM

    truth, at = case(family, method), {**LAYOUTS, **CONTEXT, **EXPERTS}[layout]
    fits, *others = pool.run(repaired, truth.teacher, truth.plan, method, tmp_path / "student", **at)
    assert all(other == fits for other in others)
    tried = [fit for fit in fits if fit.calibration[0]]
    assert sum(fit.ridge is not None for fit in tried) > len(tried) / 2
    assert all(fit.held_out[1] <= fit.held_out[0] for fit in fits)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32).eval()
    for name, got in model.state_dict().items():
        want = truth.want[name]
        assert (got - want).norm() <= 1e-4 * want.norm(), (name, float((got - want).norm() / want.norm()))
    with torch.no_grad():
        assert cross_entropy(model, samples(8, seed=9)).item() == pytest.approx(truth.loss, abs=1e-5)


def strange(topology: Topology, folder: Path, what: str) -> dict[str, Any]:
    """Refits of a model in which something is odd; the largest change of a weight, by the parameter's last words."""
    plan = random_plan(read_config(folder).shape, 3, **({} if what == "nothing cut" else {"ffn": 40}))
    teacher, source = load_hf(folder, topology, torch.float32), load_hf(folder, topology, torch.float32)
    for model in (teacher, source):
        for shard in named_shards(model):
            if what == "NaN" and shard.name == "decoder.layers.1.mlp.linear_fc2.weight":
                shard.tensor.data[0, 0] = torch.nan
            if what == "dead units" and shard.name.endswith("linear_fc1.weight"):
                shard.tensor.data[:] = 0
    student = trim(source, plan, topology)
    before = {shard.name: shard.tensor.detach().clone() for shard in named_shards(student)}
    batches = share(samples({"few tokens": 2, "one sample": 1}.get(what, 16), padded=False), topology, 1)
    refit(student, teacher, plan, batches, topology)
    return {shard.name: float((shard.tensor - before[shard.name]).abs().max()) for shard in named_shards(student)}


def test_strange_models_and_few_tokens(pool: Pool, case: Callable[[str, str], Case]) -> None:
    folder = case("llama", "sequential").teacher
    assert max(pool.run(strange, folder, "nothing cut", tp=2)[0].values()) < 1e-5
    dead = pool.run(strange, folder, "dead units")[0]
    assert max(change for name, change in dead.items() if "fc2" in name) == 0
    few = pool.run(strange, folder, "few tokens")[0]  # 12 to fit, 40 unknowns a row
    assert 0 < max(few.values()) < 1
    with pytest.raises(
        PlanError, match=r"layers\.1\.\S+ are not finite \(NaN or infinite\)\. Look for broken weights in the teacher"
    ):
        pool.run(strange, folder, "NaN", pp=2)
    with pytest.raises(
        DataError, match=r"^a refit needs 2 calibration samples at least, for one of them is held out\.$"
    ):
        pool.run(strange, folder, "one sample")


def test_a_refit_that_cannot_be_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = random_plan(SHAPE, 1, hidden=24)
    monkeypatch.setitem(_check.__globals__, "shape_of", lambda chunk: chunk.shape)
    student, teacher, wrapped = (SimpleNamespace(decoder=None, shape=shape) for shape in (plan.target, SHAPE, SHAPE))
    del wrapped.decoder
    _check([student], [teacher], plan, "outputs", [0.1])
    for chunks, method, ridges, said in (
        (([student], [teacher]), "outputs", [], "a refit needs one ridge strength at least."),
        (([student], [teacher]), "output", [1.0], "refit method 'output' is not known. Use outputs or sequential."),
        (([teacher], [teacher]), "outputs", [1.0], "the student is not the plan's: it has hidden 48 instead of 24."),
        (([student], [wrapped]), "outputs", [1.0], "a refit works on a bare GPTModel, not on SimpleNamespace: pass"),
    ):
        with pytest.raises(PlanError) as caught:
            _check(*chunks, plan, method, ridges)  # type: ignore[arg-type]
        assert said in str(caught.value)
