"""Low-rank corrections equal those of plain torch, at every layout; merged, they are ordinary weights."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from minitron_megatron.convert import load_hf, model_hash, save_hf
from minitron_megatron.data import Batch
from minitron_megatron.layout import lookup
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool
from minitron_megatron.train import LMObjective, Lora, Saving, Training, mean_loss, train
from minitron_megatron.train.lora import SCALE, initial_down
from tests.tiny import LAYOUTS, SHAPES, Stop, cross_entropy, naive_training, note, samples, share, transformer

TRAINING = Training(steps=6, lr=1e-2, min_lr=1e-3, warmup_steps=2, save_every=1, keep_checkpoints=9, save_async=False)
RANK, SEED, BATCH = 3, 5, 8
FUSED = {
    "self_attention.linear_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention.linear_proj": ("self_attn.o_proj",),
    "mlp.linear_fc1": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.linear_fc2": ("mlp.down_proj",),
}
"""Fused matrices: several of transformers' matrices, which then share one `down`."""


@dataclass(frozen=True)
class Job:
    teacher: Path
    out: Path | None = None
    recompute: Any = "none"
    checkpoints: Path | None = None
    stop_at: int | None = None


Result = tuple[list[dict[str, float]], float, float, str]
"""(curve, loss before merging, loss after, hash)."""


def correct(topology: Topology, job: Job) -> Result:
    model, curve = load_hf(job.teacher, topology, recompute=job.recompute), []
    lora = Lora(model, topology, rank=RANK, seed=SEED)
    objective, held_out = LMObjective(topology), share(samples(BATCH, seed=99), topology)
    with suppress(Stop):
        train(
            model,
            objective,
            lambda step: share(samples(BATCH, seed=step), topology, 4),
            TRAINING,
            topology,
            saving=Saving(job.checkpoints),
            listener=note(curve, job.stop_at),
        )
    if job.stop_at:
        return curve, 0.0, 0.0, ""
    before = mean_loss(model, held_out, objective, topology)[0]
    lora.merge()
    after = mean_loss(model, held_out, objective, topology)[0]
    assert all(weight.requires_grad for chunk in model for weight in chunk.parameters())
    if job.out:
        save_hf(model, job.out, topology, files_from=job.teacher)
    return curve, before, after, model_hash(model, topology)


class Corrected(nn.Module):
    """A transformers model with corrections; only these train."""

    def __init__(self, folder: Path, name: str) -> None:
        super().__init__()
        self.model = transformer(folder).requires_grad_(False)
        self.down, self.up, self.names = nn.ParameterList(), nn.ParameterList(), []
        for layer in range(SHAPES[name].layers):
            for fused, parts in FUSED.items():
                full = f"decoder.layers.{layer}.{fused}.weight"
                columns = lookup(full).shape(SHAPES[name].sizes())[1]
                self.down.append(initial_down(full, columns, RANK, SEED))
                for part in parts:
                    key = f"model.layers.{layer}.{part}.weight"
                    self.up.append(torch.zeros(self.model.get_parameter(key).shape[0], RANK))
                    self.names.append((key, len(self.down) - 1))

    def parameters(self, recurse: bool = True) -> Any:
        return iter([*self.down, *self.up])

    def weights(self) -> dict[str, Tensor]:
        return {
            key: self.model.get_parameter(key) + SCALE * up @ self.down[at]
            for (key, at), up in zip(self.names, self.up, strict=True)
        }

    def loss(self, batch: Batch) -> Tensor:
        def model(tokens: Tensor) -> Any:
            return functional_call(self.model, self.weights(), (tokens,))

        return cross_entropy(model, batch)


def truth(folder: Path, name: str) -> tuple[Corrected, list[dict[str, float]]]:
    model = Corrected(folder, name)
    return model, naive_training(
        model, lambda step: samples(BATCH, seed=step), TRAINING, lambda m, batch: m.loss(batch)
    )


@pytest.mark.parametrize(
    ("name", "layout", "recompute"),
    [
        *(("untied", layout, "none") for layout in ("tp1", "tp2-pp2", "dp2")),
        ("untied", "tp2-sp", "full"),
        ("untied", "pp2-vp2", "selective"),
        ("tied", "pp2", "none"),
    ],
)
def test_corrections_are_plain_torchs(
    pool: Pool, checkpoints: dict[str, Path], name: str, layout: str, recompute: str, tmp_path: Path
) -> None:
    """Every step's loss and gradient norm, and the merged weights, are equal; nothing else changes."""
    folder = checkpoints[name]
    model, curve = truth(folder, name)
    for found, before, after, _ in pool.run(correct, Job(folder, tmp_path / "out", recompute), **LAYOUTS[layout]):
        for key in ("loss", "grad_norm", "lr"):
            assert [step[key] for step in found] == pytest.approx([step[key] for step in curve], rel=1e-5), key
        assert before == pytest.approx(after, rel=1e-6)
    merged, expected = transformer(tmp_path / "out").state_dict(), transformer(folder).state_dict() | model.weights()
    for key, weight in merged.items():
        torch.testing.assert_close(weight, expected[key].detach(), rtol=1e-5, atol=1e-5)
    assert curve[-1]["loss"] != curve[0]["loss"]


@pytest.mark.parametrize(("first", "then"), [("tp2", "tp2"), ("tp2", "pp2"), ("pp2", "tp2-sp")])
def test_corrections_resume(pool: Pool, checkpoints: dict[str, Path], first: str, then: str, tmp_path: Path) -> None:
    """Resuming is bit-equal at the same layout and equal to 1e-5 at another, which reshards the rows of gate and up."""
    folder = checkpoints["untied"]
    whole = pool.run(correct, Job(folder), **LAYOUTS[then])[0]
    pool.run(correct, Job(folder, checkpoints=tmp_path, stop_at=4), **LAYOUTS[first])
    found = pool.run(correct, Job(folder, checkpoints=tmp_path), **LAYOUTS[then])[0]
    rest = [step["loss"] for step in whole[0] if step["step"] > 3]
    assert [step["loss"] for step in found[0]] == (rest if first == then else pytest.approx(rest, rel=1e-5))
    if first == then:
        assert found[3] == whole[3]
