"""Distillation is plain torch's KL between two transformers models, at every layout, and leaves the teacher alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_megatron.convert import folder_hash, load_hf, model_hash, save_hf
from minitron_megatron.data import Batch
from minitron_megatron.distill import KDObjective
from minitron_megatron.errors import RecipeError
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool
from minitron_megatron.train import Training, mean_loss, train
from tests.tiny import LAYOUTS, SHAPE, naive_training, samples, share, transformer, write_llama

TRAINING = Training(steps=5, lr=2e-3, min_lr=2e-4, warmup_steps=2)
BATCH, MICRO_BATCH = 8, 4


@dataclass(frozen=True)
class Job:
    """A distillation of the Hugging Face model in `teacher` into the one in `student`."""

    teacher: Path
    student: Path
    out: Path
    temperature: float = 1.0


@dataclass(frozen=True)
class Result:
    curve: list[dict[str, float]]
    held_out: tuple[float, int]
    """Mean divergence of the trained student over more micro-batches than a window, and their tokens."""
    teacher_hash: str
    teacher_is_frozen: bool


def distil(topology: Topology, job: Job) -> Result:
    teacher, student = load_hf(job.teacher, topology), load_hf(job.student, topology)
    objective = KDObjective(teacher, topology, vocab=SHAPE.vocab, temperature=job.temperature)
    curve: list[dict[str, float]] = []
    train(
        student,
        objective,
        lambda step: share(samples(BATCH, seed=step), topology, MICRO_BATCH),
        TRAINING,
        topology,
        listener=lambda event: curve.append(dict(event.values)),
    )
    save_hf(student, job.out, topology, files_from=job.student)
    held_out = mean_loss(student, share(samples(10, seed=99), topology, 1), objective, topology)
    weights = [weight for chunk in teacher for weight in chunk.parameters()]
    frozen = all(weight.grad is None and not weight.requires_grad for weight in weights)
    return Result(curve, held_out, model_hash(teacher, topology), frozen and not any(c.training for c in teacher))


def divergence(student: Any, teacher: Any, batch: Batch, temperature: float) -> Tensor:
    """sum p_t (log p_t - log p_s), in nats a token that counts."""
    with torch.no_grad():
        p_teacher = (teacher(batch.tokens).logits[batch.mask] / temperature).softmax(-1)
    p_student = (student(batch.tokens).logits[batch.mask] / temperature).softmax(-1)
    return (p_teacher * (p_teacher.log() - p_student.log())).sum(-1).mean()


CASES = [
    *(("untied", layout, 1.0) for layout in LAYOUTS),
    ("tied", "pp2-vp2", 1.0),
    ("untied", "tp2", 3.0),
]


@pytest.mark.parametrize(("teacher", "layout", "temperature"), CASES)
def test_distillation_is_plain_torchs(
    pool: Pool, checkpoints: dict[str, Path], teacher: str, layout: str, temperature: float, tmp_path: Path
) -> None:
    """Loss and gradient norm of every step and the final weights; the student is shallower and narrower."""
    job = Job(checkpoints[teacher], checkpoints["student"], tmp_path / "student", temperature)
    results = pool.run(distil, job, **LAYOUTS[layout])
    truth, of_teacher = transformer(job.student), transformer(job.teacher)
    curve = naive_training(
        truth,
        lambda step: samples(BATCH, seed=step),
        TRAINING,
        lambda model, batch: divergence(model, of_teacher, batch, temperature),
    )
    for result in results:
        for key in ("loss", "grad_norm", "lr"):
            assert [step[key] for step in result.curve] == pytest.approx([step[key] for step in curve], rel=1e-5), key
        assert result.teacher_hash == folder_hash(job.teacher)
        assert result.teacher_is_frozen
        expect_held_out(result, truth, of_teacher, temperature)
    for found, expected in zip(transformer(job.out).parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # Adam's steps are 2e-3 each


def expect_held_out(result: Result, student: Any, teacher: Any, temperature: float) -> None:
    every = samples(10, seed=99)
    with torch.no_grad():
        expected = divergence(student, teacher, every, temperature).item()
    assert result.held_out[0] == pytest.approx(expected, rel=1e-5)
    assert result.held_out[1] == int(every.mask.sum())


def teach_itself(topology: Topology, folder: Path) -> float:
    teacher, student = load_hf(folder, topology), load_hf(folder, topology)
    objective = KDObjective(teacher, topology, vocab=SHAPE.vocab)
    return mean_loss(student, share(samples(8), topology), objective, topology)[0]


def test_a_student_that_is_its_teacher_has_nothing_to_learn(pool: Pool, checkpoints: dict[str, Path]) -> None:
    for loss in pool.run(teach_itself, checkpoints["untied"], pp=2):
        assert abs(loss) < 1e-6


def test_another_vocabulary_is_refused(pool: Pool, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    other = write_llama(tmp_path / "other", replace(SHAPE, vocab=130), seed=0)
    with pytest.raises(RecipeError, match=r"the teacher has 130 vocabulary entries and the student 131\. They must"):
        pool.run(teach_itself, other)
