"""An MoE model trains as in plain torch at every expert-parallel layout, and resumes at another layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.testing import Pool
from minitron_megatron.train import Training
from tests.convert.conftest import make_folder
from tests.tiny import cross_entropy, naive_training, samples

from .test_loop import BATCH, Job, column, run

TRAINING = Training(steps=6, lr=1e-3, min_lr=1e-4, warmup_steps=2, save_every=3, save_async=False)
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp1": {},
    "dp2": {"dp": 2},
    "tp2-pp2": {"tp": 2, "pp": 2, "sequence_parallel": True},
    "ep2": {"ep": 2, "dp": 2},
    "ep2-tp2": {"ep": 2, "tp": 2, "sequence_parallel": True},
    "ep4-tp2-dp2": {"ep": 4, "tp": 2, "dp": 2, "sequence_parallel": True},
}


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("mixture") / "model", "qwen2_moe", num_hidden_layers=2)


@pytest.fixture(scope="module")
def truth(mixture: Path) -> list[dict[str, float]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(mixture, dtype="float32").train()
    return naive_training(model, lambda step: samples(BATCH, seed=step), TRAINING, cross_entropy)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradients_are_those_of_plain_torch(
    pool: Pool, mixture: Path, truth: list[dict[str, float]], layout: str
) -> None:
    curve, _ = pool.run(run, Job(mixture, TRAINING, micro_batch=4), **LAYOUTS[layout])[0]
    for key in ("loss", "grad_norm", "lr"):
        assert column(curve, key) == pytest.approx([step[key] for step in truth], rel=2e-4), key


@pytest.mark.parametrize(("first", "second"), [("ep2", "ep2"), ("ep2", "tp1"), ("tp1", "ep2-tp2")])
def test_a_stopped_run_goes_on_at_another_spread(
    pool: Pool, mixture: Path, first: str, second: str, tmp_path: Path
) -> None:
    whole, digest = pool.run(run, Job(mixture, TRAINING, micro_batch=4), **LAYOUTS[second])[0]
    job = Job(mixture, TRAINING, micro_batch=4, checkpoints=tmp_path / "checkpoints")
    pool.run(run, replace(job, stop_at=4), **LAYOUTS[first])
    rest, resumed = pool.run(run, job, **LAYOUTS[second])[0]
    assert [step["step"] for step in rest] == [4, 5, 6]
    assert column(rest, "loss") == pytest.approx(column(whole, "loss")[3:], rel=1e-5)
    if first == second:
        assert resumed == digest
