"""Continuous correction equals two plain models that train side by side, each with its own optimizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_megatron.convert import load_hf, model_hash
from minitron_megatron.distill import ContinuousObjective
from minitron_megatron.losses import KDLoss
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool
from minitron_megatron.train import Learner, Saving, Training, mean_loss, train
from tests.losses.cases import naive
from tests.tiny import LAYOUTS, SHAPE, NaiveOptimizer, Stop, cross_entropy, note, samples, share, transformer

STUDENT = Training(steps=6, lr=2e-3, min_lr=2e-4, warmup_steps=2)
TEACHER = Training(steps=6, lr=1e-3, min_lr=1e-4, warmup_steps=3)
BATCH = 8


@dataclass(frozen=True)
class Job:
    teacher: Path
    student: Path
    checkpoints: Path | None = None
    stop_at: int | None = None


Result = tuple[list[dict[str, float]], float, str, str]
"""(curve, the student's divergence from what the teacher became, hash of the teacher, of the student)."""


def distil(topology: Topology, job: Job) -> Result:
    teacher, student = load_hf(job.teacher, topology), load_hf(job.student, topology)
    objective = ContinuousObjective(Learner(teacher, TEACHER, topology, "teacher"), topology, vocab=SHAPE.vocab)
    curve: list[dict[str, float]] = []

    try:
        train(
            student,
            objective,
            lambda step: share(samples(BATCH, seed=step), topology, 4),
            STUDENT.replaced(save_every=2, save_async=False),
            topology,
            saving=Saving(job.checkpoints),
            co_trained=[objective.learner],
            listener=note(curve, job.stop_at),
        )
    except Stop:
        return curve, 0.0, "", ""
    after = mean_loss(student, share(samples(BATCH, seed=99), topology, 2), objective.plain(), topology)[0]
    return curve, after, model_hash(teacher, topology), model_hash(student, topology)


def divergence(student: Any, teacher: Any, batch: Any) -> Any:
    with torch.no_grad():
        of_teacher = teacher(batch.tokens).logits[batch.mask]
    return naive(KDLoss(), student(batch.tokens).logits[batch.mask], of_teacher) / batch.mask.sum()


def truth(job: Job) -> tuple[list[float], float]:
    """Return (the student's losses, its final divergence), by plain torch on transformers' models."""
    models = [transformer(job.teacher), transformer(job.student)]
    optimizers = [NaiveOptimizer(*each) for each in zip(models, (TEACHER, STUDENT), strict=True)]
    losses = []
    for step in range(STUDENT.steps):
        batch = samples(BATCH, seed=step)
        found = [cross_entropy(models[0], batch), divergence(models[1], models[0], batch)]
        losses.append(found[1].item())
        for optimizer, loss in zip(optimizers, found, strict=True):
            optimizer.step(loss)
    with torch.no_grad():
        return losses, divergence(models[1], models[0], samples(BATCH, seed=99)).item()


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2-vp2", "dp2"])  # test_states.py has tp2-pp2
def test_teacher_and_student_step_together(pool: Pool, checkpoints: dict[str, Path], layout: str) -> None:
    job = Job(checkpoints["untied"], checkpoints["student"])
    losses, after = truth(job)
    for curve, found, _, _ in pool.run(distil, job, **LAYOUTS[layout]):
        assert [step["loss"] for step in curve] == pytest.approx(losses, rel=1e-5)
        assert found == pytest.approx(after, rel=1e-4)


def test_both_resume_to_the_bit(pool: Pool, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    job = Job(checkpoints["tied"], checkpoints["student"])
    whole = pool.run(distil, job, pp=2)[0]
    pool.run(distil, replace(job, checkpoints=tmp_path, stop_at=5), pp=2)
    curve, *rest = pool.run(distil, replace(job, checkpoints=tmp_path), pp=2)[0]
    assert [(step["step"], step["loss"]) for step in curve] == [(s["step"], s["loss"]) for s in whole[0][4:]]
    assert rest == list(whole[1:])
