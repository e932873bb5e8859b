"""Distillation equals plain torch between two transformers models, at every layout, and does not change the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_megatron.convert import folder_hash, load_hf, model_hash, save_hf
from minitron_megatron.data import Batch
from minitron_megatron.distill import KDObjective
from minitron_megatron.distill.offload import Offload
from minitron_megatron.errors import RecipeError
from minitron_megatron.layout import layer_of
from minitron_megatron.losses import KDLoss
from minitron_megatron.model import named_shards, output_weight
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool
from minitron_megatron.train import LMObjective, Training, mean_loss, train
from tests.losses.cases import naive
from tests.tiny import (
    CONTEXT,
    LAYOUTS,
    SHAPE,
    cross_entropy,
    naive_training,
    samples,
    share,
    transformer,
    write_llama,
)

TRAINING = Training(steps=3, lr=2e-3, min_lr=2e-4, warmup_steps=1)
BATCH, MICRO_BATCH = 8, 4
HELD_OUT = samples(BATCH, seed=99)
FORWARD_KL = KDLoss()


@dataclass(frozen=True)
class Job:
    """Distillation of the Hugging Face model in `teacher` into the one in `student`."""

    teacher: Path
    student: Path
    out: Path
    loss: KDLoss = FORWARD_KL
    micro_batch: int = MICRO_BATCH
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    curve: list[dict[str, float]]
    held_out: tuple[float, int]
    """Mean divergence of the trained student over more micro-batches than a window, and their tokens."""
    teacher_hash: str
    teacher_is_frozen: bool


def distil(topology: Topology, job: Job) -> Result:
    teacher, student = load_hf(job.teacher, topology), load_hf(job.student, topology)
    objective = KDObjective(teacher, topology, vocab=SHAPE.vocab, loss=job.loss, **job.options)
    curve: list[dict[str, float]] = []
    train(
        student,
        objective,
        lambda step: share(samples(BATCH, seed=step), topology, job.micro_batch),
        TRAINING,
        topology,
        listener=lambda event: curve.append(dict(event.values)),
    )
    save_hf(student, job.out, topology, files_from=job.student)
    held_out = mean_loss(student, share(HELD_OUT, topology, 2), objective, topology)
    weights = [weight for chunk in teacher for weight in chunk.parameters()]
    frozen = all(weight.grad is None and not weight.requires_grad for weight in weights)
    digest = "" if job.options.get("pack") else model_hash(teacher, topology)
    return Result(curve, held_out, digest, frozen and not any(c.training for c in teacher))


def loss_of(student: Any, teacher: Any, batch: Batch, loss: KDLoss) -> Tensor:
    """Return divergence and cross-entropy per unmasked token."""
    with torch.no_grad():
        of_teacher = teacher(batch.tokens).logits[batch.mask]
    divergence = naive(loss, student(batch.tokens).logits[batch.mask], of_teacher) / batch.mask.sum()
    return divergence + loss.ce_weight * cross_entropy(student, batch)


CASES = [
    *(("untied", "student", layout, KDLoss()) for layout in ("tp1", "tp2-pp2", "cp2-tp2-sp")),
    ("tied", "student", "pp2-vp2", KDLoss()),
    ("untied", "student", "cp2-pp2-vp2", KDLoss(temperature=3.0)),
    ("untied", "tied", "tp2-pp2", KDLoss("reverse_kl", temperature=0.7)),
    ("untied", "student", "pp2", KDLoss("jsd", beta=0.3)),
    ("untied", "student", "pp2-vp2", KDLoss("mse")),
    ("untied", "student", "tp2-sp", KDLoss("cosine", ce_weight=0.5)),
    ("untied", "student", "tp2-pp2", KDLoss(top_k=20, ce_weight=0.5)),
    ("untied", "student", "dp2", KDLoss("jsd", top_k=20)),
]


@pytest.mark.parametrize(("teacher", "student", "layout", "loss"), CASES)
def test_distillation_is_plain_torchs(
    pool: Pool, checkpoints: dict[str, Path], teacher: str, student: str, layout: str, loss: KDLoss, tmp_path: Path
) -> None:
    """Loss and gradient norm of every step, and the final weights, are equal; `student` is shallower and narrower."""
    job = Job(checkpoints[teacher], checkpoints[student], tmp_path / "student", loss)
    results = pool.run(distil, job, **(LAYOUTS | CONTEXT)[layout])
    truth, of_teacher = transformer(job.student), transformer(job.teacher)
    curve = naive_training(
        truth,
        lambda step: samples(BATCH, seed=step),
        TRAINING,
        lambda model, batch: loss_of(model, of_teacher, batch, loss),
    )
    for result in results:
        for key in ("loss", "grad_norm", "lr"):
            assert [step[key] for step in result.curve] == pytest.approx([step[key] for step in curve], rel=1e-5), key
        assert result.teacher_hash == folder_hash(job.teacher)
        assert result.teacher_is_frozen
        expect_held_out(result, truth, of_teacher, loss)
    for found, expected in zip(transformer(job.out).parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # Adam's steps are 2e-3 each


def expect_held_out(result: Result, student: Any, teacher: Any, loss: KDLoss) -> None:
    with torch.no_grad():
        expected = loss_of(student, teacher, HELD_OUT, loss).item()
    assert result.held_out[0] == pytest.approx(expected, rel=1e-5)
    assert result.held_out[1] == int(HELD_OUT.mask.sum())


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ("tp1", {"window": 3, "offload": True}),
        ("tp2-sp", {"window": 2}),
        ("pp2-vp2", {"window": 2, "offload": True}),
        ("dp2", {"window": 1}),  # gradients are reduced over replicas in the last window alone
    ],
    ids=["tp1", "tp2-sp", "pp2-vp2", "dp2"],
)
def test_a_teacher_that_lies_elsewhere_or_runs_in_windows_teaches_the_same(
    pool: Pool, checkpoints: dict[str, Path], layout: str, options: dict, tmp_path: Path
) -> None:
    job = Job(checkpoints["untied"], checkpoints["student"], tmp_path / "student", micro_batch=2)
    for offloaded, plain in zip(
        pool.run(distil, replace(job, options=options), **LAYOUTS[layout]),
        pool.run(distil, job, **LAYOUTS[layout]),
        strict=True,
    ):
        assert offloaded.teacher_hash == plain.teacher_hash and offloaded.held_out == plain.held_out
        for key in ("loss", "grad_norm"):
            assert [step[key] for step in offloaded.curve] == [step[key] for step in plain.curve]


def what_moves(topology: Topology, folder: Path) -> tuple[bool, bool]:
    """Return whether all weights except the output layer are offloaded, and whether the output layer is."""
    model = load_hf(folder, topology)
    last = output_weight(model[-1]) if topology.is_last_stage else None
    others = [weight for chunk in model for weight in chunk.parameters() if weight is not last]
    offload = Offload(model, topology)
    assert all(weight.device.type == "cpu" for weight in others)
    with offload.on_device():
        assert all(weight.device == topology.device for weight in others)
    return all(weight in offload.host for weight in others), last is not None and last in offload.host


@pytest.mark.parametrize("layout", ["tp1", "pp2"])
def test_all_is_offloaded_but_the_output_layer_which_the_loss_reads(
    pool: Pool, checkpoints: dict[str, Path], layout: str
) -> None:
    for teacher in ("untied", "tied"):
        assert set(pool.run(what_moves, checkpoints[teacher], **LAYOUTS[layout])) == {(True, False)}


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


def padded_unlike(topology: Topology, teacher: Path, shared: int | None, top_k: int | None) -> float:
    """Return the first loss of a student with 131 vocabulary entries, of which those above `shared` are padding."""
    objective = KDObjective(
        load_hf(teacher, topology), topology, vocab=SHAPE.vocab, shared=shared, loss=KDLoss(top_k=top_k)
    )
    student = load_hf(teacher.parent / "student", topology)
    return mean_loss(student, share(samples(8), topology), objective, topology)[0]


@pytest.mark.parametrize("layout", ["tp2", "tp2-pp2"])
def test_a_teacher_with_more_padding_teaches_what_is_shared(
    pool: Pool, checkpoints: dict[str, Path], layout: str, tmp_path: Path
) -> None:
    """The teacher's 300 rows are split over the two ranks differently from the student's 131."""
    teacher = write_llama(tmp_path / "teacher", replace(SHAPE, vocab=300), seed=0)
    (tmp_path / "student").symlink_to(checkpoints["student"])
    batch = samples(8)
    with torch.no_grad():
        logits = transformer(teacher)(batch.tokens).logits[batch.mask][:, :131]
        expected = naive(KDLoss(), transformer(checkpoints["student"])(batch.tokens).logits[batch.mask], logits)
    for found in pool.run(padded_unlike, teacher, 131, None, **LAYOUTS[layout]):
        assert found == pytest.approx(float(expected / batch.mask.sum()), rel=1e-5)


@pytest.mark.parametrize(
    ("shared", "top_k", "said"),
    [
        (None, None, r"the teacher has 300 vocabulary entries and the student 131\. .* only in padding, pass"),
        (132, None, r"^132 vocabulary entries cannot be shared: the teacher has 300 and the student 131\. Pass the"),
        (131, 132, r"`top_k` is 132, but there are 131 vocabulary entries\. Ask for fewer\."),
    ],
)
def test_vocabularies_that_cannot_be_shared_are_refused(
    pool: Pool, tmp_path: Path, shared: int | None, top_k: int | None, said: str
) -> None:
    """The error is raised on every rank, before anything runs."""
    teacher = write_llama(tmp_path / "teacher", replace(SHAPE, vocab=300), seed=0)
    with pytest.raises(RecipeError, match=said):
        pool.run(padded_unlike, teacher, shared, top_k, pp=2)


def states_between_steps(topology: Topology, teacher: Path, student: Path) -> list[int]:
    """Return how many of the teacher's states are held after each step, when a checkpoint is written."""
    objective = KDObjective(load_hf(teacher, topology), topology, vocab=SHAPE.vocab)
    counts: list[int] = []
    train(
        load_hf(student, topology),
        objective,
        lambda step: share(samples(BATCH, seed=step), topology),
        TRAINING.replaced(steps=2),
        topology,
        listener=lambda event: counts.append(len(objective._hidden)),
    )
    return counts


def test_no_teacher_states_are_held_while_a_checkpoint_is_written(pool: Pool, checkpoints: dict[str, Path]) -> None:
    assert pool.run(states_between_steps, checkpoints["untied"], checkpoints["student"]) == [[0, 0]]


def held(topology: Topology, teacher: Path) -> tuple[float, int, int, list[str]]:
    """Return (the packed teacher's cross-entropy, most states stored, bytes of its layers, names left unpacked)."""
    model = load_hf(teacher, topology)
    objective = KDObjective(model, topology, vocab=SHAPE.vocab, pack=True, window=1)
    found = mean_loss(model, share(samples(BATCH), topology), LMObjective(topology), topology)[0]
    objective.prepare(share(samples(BATCH), topology)[:1])
    layers = [shard for shard in named_shards(model) if layer_of(shard.name) is not None]
    assert all("weight" not in module.__dict__ for chunk in model for module in chunk.modules())
    wide = [shard.name for shard in layers if shard.tensor.element_size() > 1]
    return found, len(objective._hidden), sum(shard.tensor.nbytes for shard in layers), wide


def test_a_packed_teacher_is_the_same_at_every_layout_and_a_byte_a_weight(
    pool: Pool, checkpoints: dict[str, Path]
) -> None:
    """The weights equal plain torch's, with each row rounded to e4m3 by its largest value."""
    teacher = transformer(checkpoints["untied"])
    with torch.no_grad():
        before = cross_entropy(teacher, samples(BATCH)).item()
        for name, weight in teacher.model.layers.named_parameters():
            if "proj" in name:
                scale = weight.abs().amax(1, keepdim=True) / 448.0
                weight.copy_((weight / scale).to(torch.float8_e4m3fn).float() * scale)
        truth = cross_entropy(teacher, samples(BATCH)).item()
    assert abs(truth - before) > 1e-5
    for layout in ("tp2-sp", "tp2-pp2"):
        for loss, states, _, wide in pool.run(held, checkpoints["untied"], **LAYOUTS[layout]):
            assert loss == pytest.approx(truth, rel=1e-5)
            assert states <= 1 and all("norm" in name for name in wide)
    (_, _, nbytes, _), *_ = pool.run(held, checkpoints["untied"])
    whole = sum(weight.nbytes for weight in teacher.model.layers.parameters())
    assert nbytes < 0.26 * whole


def test_a_packed_teacher_teaches(pool: Pool, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    job = Job(checkpoints["untied"], checkpoints["student"], tmp_path / "student")
    packed, plain = (pool.run(distil, replace(job, options={"pack": each}), tp=2)[0] for each in (True, False))
    assert packed.teacher_is_frozen and packed.held_out != plain.held_out
    assert packed.held_out[0] == pytest.approx(plain.held_out[0], rel=0.1)
