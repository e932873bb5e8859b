"""Training on hidden states equals plain torch with two transformers models and one linear map, at every layout."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minitron_megatron.convert import load_hf, model_hash, save_hf
from minitron_megatron.data import Batch, Corpus, step_batches
from minitron_megatron.data.chat_encode import COUNTS, LAST, MARK
from minitron_megatron.data.token_writer import pair_writers
from minitron_megatron.distill import ContinuousObjective, KDObjective, StateLoss, StatePairs
from minitron_megatron.distill.states import StateTap, _module
from minitron_megatron.errors import RecipeError
from minitron_megatron.losses import KDLoss
from minitron_megatron.model import Recompute
from minitron_megatron.parallel import Topology, sum_over_world
from minitron_megatron.testing import Pool
from minitron_megatron.train import Learner, Saving, Training, train
from tests.losses.cases import assert_close, naive
from tests.tiny import (
    CONTEXT,
    EVERY,
    LAYOUTS,
    SEQUENCE,
    SHAPE,
    SHAPES,
    NaiveOptimizer,
    Stop,
    cross_entropy,
    naive_training,
    note,
    samples,
    share,
    transformer,
)

TRAINING = Training(steps=4, lr=2e-3, min_lr=2e-4, warmup_steps=2)
BATCH, SEED = 8, 5
FORWARD_KL = KDLoss()
TEACHER = Training(steps=4, lr=1e-3, min_lr=1e-4, warmup_steps=3)
EVERY_STATE = StatePairs(embedding=True, outputs=("2:1", "4:3"), mlp_inputs=("1:0",), attention=("4:3",))
CASES = {
    "every": EVERY_STATE,
    "embedding": StatePairs(embedding=True, alpha=0.7),
    "outputs": StatePairs(outputs=("2:1", "4:3"), loss="mse", alpha=0.7),
    "mlp_inputs": StatePairs(mlp_inputs=("1:0", "4:3"), alpha=2.0),
    "attention": StatePairs(attention=("1:0", "4:3"), alpha=0.7),
    "tokens": EVERY_STATE.replaced(attention=()),
}


@dataclass(frozen=True)
class Job:
    teacher: Path
    student: Path
    pairs: StatePairs = EVERY_STATE
    loss: KDLoss = FORWARD_KL
    micro_batch: int = 4
    recompute: Recompute = "none"
    continuous: bool = False
    """Whether the teacher is corrected continuously."""
    checkpoints: Path | None = None
    stop_at: int | None = None
    chats: Path | None = None
    """Prefix of a prepared corpus of chats that gives the batches."""


Result = tuple[list[dict[str, float]], list[Tensor], str]
"""(curve, the map between widths on each chunk, hash of the student)."""


def distil(topology: Topology, job: Job) -> Result:
    teacher, student = load_hf(job.teacher, topology), load_hf(job.student, topology, recompute=job.recompute)
    states = StateLoss(teacher, student, job.pairs, topology, seed=SEED)
    how: dict[str, Any] = {"vocab": SHAPE.vocab, "loss": job.loss, "states": states}
    if job.continuous:
        objective: KDObjective = ContinuousObjective(Learner(teacher, TEACHER, topology, "teacher"), topology, **how)
    else:
        objective = KDObjective(teacher, topology, **how)
    curve: list[dict[str, float]] = []

    try:
        train(
            student,
            objective,
            lambda step: share(samples(BATCH, seed=step), topology, job.micro_batch),
            TRAINING.replaced(save_every=2, save_async=False),
            topology,
            saving=Saving(job.checkpoints),
            co_trained=[objective.learner] if isinstance(objective, ContinuousObjective) else [],
            listener=note(curve, job.stop_at),
        )
    except Stop:
        return curve, [], ""
    maps = [bridge.linear.weight.detach().clone() for bridge in states.bridges if bridge.linear is not None]
    states.release()
    assert not any("bridge" in name for chunk in student for name, _ in chunk.named_parameters())
    return curve, maps, model_hash(student, topology)


def gradients(topology: Topology, job: Job, out: Path) -> list[tuple[Tensor, Tensor]]:
    """Return the map's gradients on each chunk; the model's gradients are written to `out` in place of its weights."""
    teacher, student = load_hf(job.teacher, topology), load_hf(job.student, topology)
    states = StateLoss(teacher, student, job.pairs, topology, seed=SEED)
    objective = KDObjective(teacher, topology, vocab=SHAPE.vocab, loss=job.loss, states=states)
    learner = Learner(student, TRAINING, topology)
    batches = packed_chats(topology, job) if job.chats else share(samples(BATCH, seed=0), topology, job.micro_batch)
    objective.prepare(batches)
    for chunk in learner.chunks:
        chunk.zero_grad_buffer()
    learner._passes(batches, objective)
    gather_gradients(learner, topology)
    lines = [bridge.linear for bridge in states.bridges if bridge.linear is not None]
    of_maps = [(line.weight.main_grad.clone(), line.bias.main_grad.clone()) for line in lines]
    found = {id(p): p.main_grad.clone() for chunk in student for p in chunk.parameters()}
    for chunk in student:
        for parameter in chunk.parameters():
            parameter.data = found[id(parameter)]
    learner.release()
    states.release()
    save_hf(student, out, topology, files_from=job.student)
    return of_maps


def gather_gradients(learner: Learner, topology: Topology) -> None:
    """Complete the gradients of data-parallel ranks, each of which has the sum of its own part alone."""
    for chunk in learner.chunks if topology.dp > 1 else ():
        for bucket in (bucket for group in chunk.bucket_groups for bucket in group.buckets):
            whole = torch.zeros_like(bucket.grad_data)
            mine, own = (each.chunk(topology.dp)[topology.dp_rank] for each in (whole, bucket.grad_data))
            mine.copy_(own)
            bucket.grad_data.copy_(sum_over_world(whole))


def packed_chats(topology: Topology, job: Job) -> list[Batch]:
    """Return this rank's micro-batches of packed chats, as a run reads them."""
    assert job.chats
    corpus = Corpus([(job.chats, 1.0)], sequence=SEQUENCE, samples=BATCH, seed=0, cache=job.chats.parent, end=0)
    ranks = {"dp_rank": topology.replica, "dp": topology.replicas}
    batches = step_batches(corpus, 0, global_batch=BATCH, micro_batch=job.micro_batch, **ranks)
    return [batch.to(topology.device).shared(topology) for batch in batches]


def write_chats(prefix: Path) -> Path:
    """Write random chats of 3 to 9 tokens, of whose tokens a third counts; token 0 may be anywhere in them."""
    draw = np.random.default_rng(0)
    with pair_writers(prefix, ["train"], [np.uint16, MARK], "key") as work:
        for length in draw.integers(3, 10, size=40):
            marks = (draw.random(length) < 1 / 3).astype(MARK)
            marks[-1] = COUNTS + LAST
            work.writers["train"].add(draw.integers(0, SHAPE.vocab, length).astype(np.uint16), marks)
        work.finish(goes_on=False)
    return prefix


class Taught(nn.Module):
    """A transformers student with the linear map of its states."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.student, self.teacher_ = transformer(job.student).double(), [transformer(job.teacher).double()]
        widths = [model.config.hidden_size for model in (self.student, self.teacher_[0])]
        self.raised: nn.Module = nn.Identity()
        if widths[0] != widths[1] and any((job.pairs.embedding, job.pairs.outputs, job.pairs.mlp_inputs)):
            self.raised = nn.Linear(widths[0], widths[1])
            bound = 1 / math.sqrt(widths[0])
            draw = torch.Generator().manual_seed(SEED)
            with torch.no_grad():
                self.raised.weight.uniform_(-bound, bound, generator=draw)
                self.raised.bias.zero_()
            self.raised.double()
        self.job, self.alpha, self.seen = job, job.pairs.alpha, []

    def forward(self, batch: Batch) -> Tensor:
        """Return the total loss per token; its parts are added to `seen`."""
        job, loss, tokens = self.job, self.job.loss, batch.mask.sum()
        with torch.no_grad():
            of_teacher, theirs = observed(self.teacher_[0], batch)
        of_student, ours = observed(self.student, batch)
        logits = naive(loss.replaced(ce_weight=0.0), of_student[batch.mask], of_teacher[batch.mask]) / tokens
        parts = [self.pair(kind, theirs[kind, t], ours[kind, s], batch.mask) for kind, t, s in mapped(job.pairs)]
        states = torch.stack(parts).mean() / tokens
        if job.pairs.dynamic and not self.seen:
            self.alpha = (logits / states).item()
        reported = logits + loss.ce_weight * cross_entropy(self.student, batch)
        self.seen.append({"loss": reported.item(), "states_loss": states.item(), "alpha": self.alpha})
        whole = reported + self.alpha * states
        if job.pairs.dynamic:
            self.alpha = (logits / states).item()
        return whole

    def pair(self, kind: str, theirs: Any, ours: Any, mask: Tensor) -> Tensor:
        """Return the loss of a pair, summed over tokens."""
        if kind == "attention":
            heads = math.gcd(SHAPES["untied"].kv_groups, SHAPES["student"].kv_groups)
            of_roles = [relations(t, s, mask, heads) for t, s in zip(theirs, ours, strict=True)]
            return torch.stack(of_roles).mean()
        theirs, ours = theirs[mask], self.raised(ours[mask])
        if self.job.pairs.loss == "mse":
            return F.mse_loss(ours, theirs, reduction="none").mean(-1).sum()
        return (1 - F.cosine_similarity(ours, theirs, dim=-1)).sum()


def mapped(pairs: StatePairs) -> list[tuple[str, int, int]]:
    found = [("outputs", -1, -1)] if pairs.embedding else []
    for kind in ("outputs", "mlp_inputs", "attention"):
        found += [(kind, *map(int, each.split(":"))) for each in getattr(pairs, kind)]
    return found


def relations(theirs: Tensor, ours: Tensor, mask: Tensor, heads: int) -> Tensor:
    """Return the KL divergence of attention rows, summed over tokens and averaged over heads."""
    causal = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool).tril()

    def rows(states: Tensor, head: int) -> Tensor:
        part = states.chunk(heads, -1)[head]
        scores = part @ part.transpose(1, 2) / math.sqrt(part.shape[-1])
        return scores.masked_fill(~causal, -1e30).log_softmax(-1)

    total = []
    for head in range(heads):
        p, q = rows(theirs, head), rows(ours, head)
        total.append(torch.where(causal, p.exp() * (p - q), 0.0).sum(-1)[mask].sum())
    return torch.stack(total).mean()


def observed(model: Any, batch: Batch) -> tuple[Tensor, dict[tuple[str, int], Any]]:
    """Return (logits, (kind, layer) -> states); the embedding is the output of layer -1."""
    seen: dict[tuple[str, int], Any] = {}
    layers, handles = model.model.layers, []

    def keep(key: tuple[str, int], module: nn.Module) -> None:
        handles.append(module.register_forward_hook(lambda _m, _i, output: seen.__setitem__(key, output)))

    for at, layer in enumerate(layers):
        keep(("outputs", at - 1), layer.input_layernorm)
        keep(("mlp_inputs", at), layer.post_attention_layernorm)
        for role in "qkv":
            keep((role, at), getattr(layer.self_attn, f"{role}_proj"))
    keep(("outputs", len(layers) - 1), model.model.norm)
    logits = model(batch.tokens).logits
    for handle in handles:
        handle.remove()
    return logits, seen | {("attention", at): [seen[role, at] for role in "qkv"] for at in range(len(layers))}


def truth(job: Job) -> tuple[Taught, list[dict[str, float]]]:
    """Train with plain torch; return the student and its curve."""
    taught = Taught(job)
    corrected = NaiveOptimizer(taught.teacher_[0], TEACHER) if job.continuous else None

    def loss_of(model: Any, batch: Batch) -> Tensor:
        loss: Tensor = model(batch)
        if corrected:
            corrected.step(cross_entropy(taught.teacher_[0], batch))
        return loss

    curve = naive_training(taught, lambda step: samples(BATCH, seed=step), TRAINING, loss_of)
    return taught, [step | seen for step, seen in zip(curve, taught.seen, strict=True)]


def expect_same(found: list[dict[str, float]], expected: list[dict[str, float]], rel: float = 1e-5) -> None:
    for key in ("loss", "grad_norm", "states_loss", "alpha"):
        assert [step[key] for step in found] == pytest.approx([step[key] for step in expected], rel=rel), key


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        *(("every", layout) for layout in EVERY),
        ("outputs", "tp2-pp2"),
        ("tokens", "cp2-tp2-sp"),
    ],
)
def test_states_are_learnt_as_plain_torch_does(
    pool: Pool, checkpoints: dict[str, Path], case: str, layout: str
) -> None:
    """Losses, alpha and gradient norm of every step, and the final map, are equal."""
    job = Job(checkpoints["untied"], checkpoints["student"], CASES[case])
    taught, expected = truth(job)
    for curve, maps, _ in pool.run(distil, job, **(LAYOUTS | CONTEXT)[layout]):
        expect_same(curve, expected)
        for found in maps:
            torch.testing.assert_close(found, taught.raised.weight.detach().float(), rtol=1e-5, atol=1e-5)
        assert maps


@pytest.mark.parametrize("case", [case for case in CASES if case != "tokens"])
def test_gradients_are_those_of_plain_torch(
    pool: Pool, checkpoints: dict[str, Path], case: str, tmp_path: Path
) -> None:
    job = Job(checkpoints["untied"], checkpoints["student"], CASES[case], KDLoss(ce_weight=0.3))
    taught = Taught(job)
    taught(samples(BATCH, seed=0)).backward()
    for maps in pool.run(gradients, job, tmp_path / "gradients", **LAYOUTS["tp2-pp2"]):
        for of_map in maps:
            for found, line in zip(of_map, taught.raised.parameters(), strict=True):
                assert_close(found, line.grad.float(), 1e-5, "the map")
        assert bool(maps) == isinstance(taught.raised, nn.Linear)
    of_student = dict(taught.student.named_parameters())
    for name, found in transformer(tmp_path / "gradients").named_parameters():
        assert_close(found.detach(), of_student[name].grad.float(), 1e-5, name)


def test_masks_of_packed_chats_reach_every_loss_at_every_layout(
    pool: Pool, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Gradients of cross-entropy, divergence and states on packed chats, documents apart, are those of one process."""
    pairs = CASES["tokens"].replaced(alpha=0.7)
    chats, loss = write_chats(tmp_path / "chats"), KDLoss(ce_weight=0.3)
    job = Job(checkpoints["untied"], checkpoints["student"], pairs, loss, chats=chats)
    [batch] = pool.run(packed_chats, replace(job, micro_batch=BATCH))[0]
    assert 8 < batch.mask.sum() < 40 and batch.attention_context.documents.max() > 1
    found = {}
    for layout in ("tp1", "tp2-sp", "tp2-pp2", "cp2"):
        pool.run(gradients, job, tmp_path / layout, **(LAYOUTS | CONTEXT)[layout])
        found[layout] = dict(transformer(tmp_path / layout).named_parameters())
        for name, gradient in found[layout].items():
            assert_close(gradient.detach(), found["tp1"][name].detach(), 1e-5, f"{name} at {layout}")


def test_models_of_one_width_need_no_map(pool: Pool, checkpoints: dict[str, Path]) -> None:
    job = Job(checkpoints["untied"], checkpoints["tied"], StatePairs(outputs=("1:1",)))
    _, expected = truth(job)
    for curve, maps, _ in pool.run(distil, job, pp=2):
        expect_same(curve, expected)
        assert not maps


def test_a_teacher_that_is_corrected_meanwhile(pool: Pool, checkpoints: dict[str, Path]) -> None:
    job = Job(checkpoints["untied"], checkpoints["student"], continuous=True)
    _, expected = truth(job)
    for curve, _, _ in pool.run(distil, job, **LAYOUTS["tp2-pp2"]):
        expect_same(curve, expected)


@pytest.mark.parametrize("layout", ["tp1", "pp2-vp2"])
def test_what_runs_again_is_compared_once(pool: Pool, checkpoints: dict[str, Path], layout: str) -> None:
    job = Job(checkpoints["untied"], checkpoints["student"])
    plain, *again = (
        pool.run(distil, replace(job, recompute=how), **LAYOUTS[layout])[0] for how in ("none", "selective", "full")
    )
    for curve, _, _ in again:
        expect_same(curve, plain[0])


def test_no_micro_batch_size_changes_it(pool: Pool, checkpoints: dict[str, Path]) -> None:
    job = Job(checkpoints["untied"], checkpoints["student"])
    small, large = (pool.run(distil, replace(job, micro_batch=size))[0][0] for size in (2, 8))
    expect_same(small, large)


def test_the_map_resumes_to_the_bit(pool: Pool, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """It also resumes at another layout, up to rounding."""
    job = Job(checkpoints["untied"], checkpoints["student"])
    whole = pool.run(distil, job, pp=2)[0]
    for name, layout in (("same", {"pp": 2}), ("other", {"tp": 2})):
        stopped = replace(job, checkpoints=tmp_path / name, stop_at=3)
        pool.run(distil, stopped, pp=2)
        curve, maps, weights = pool.run(distil, replace(stopped, stop_at=None), **layout)[0]
        assert [step["step"] for step in curve] == [3, 4]
        expect_same(curve, whole[0][2:])
        if name == "same":
            assert [(s["loss"], s["alpha"]) for s in curve] == [(s["loss"], s["alpha"]) for s in whole[0][2:]]
            assert torch.equal(maps[0], whole[1][0]) and weights == whole[2]


@pytest.mark.parametrize("kind", ["mlp_inputs", "outputs"])
def test_a_fused_norm_says_how_to_build_the_model(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    norms = {name: torch.nn.Identity() for name in ("pre_mlp_layernorm", "input_layernorm")}
    layers = [SimpleNamespace(layer_number=number, **norms) for number in range(1, SHAPE.layers + 1)]
    chunk: Any = SimpleNamespace(decoder=SimpleNamespace(layers=layers), shape=SHAPE)
    monkeypatch.setitem(_module.__globals__, "shape_of", lambda chunk: chunk.shape)
    with pytest.raises(RecipeError) as caught:
        _module(chunk, StateTap(kind, 1))
    at = 1 if kind == "mlp_inputs" else 2
    assert str(caught.value) == (
        f"the norm before layer {at} is fused into the linear layer after it, so its output cannot be read. Build the "
        "model with mcore's local layer spec."
    )
