"""Memory of the losses beyond their inputs and returned gradients: a fraction of one tensor of logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from minitron_megatron.losses import DIVERGENCES, KDLoss, Output, Vocabulary, distill_loss, lm_loss
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import LivePeak, Pool
from tests.losses.cases import each_layout

TOKENS, VOCAB, WIDTH = 1024, 8192, 64
BOUND = 1 / 4
"""Limit as a fraction of one local fp32 tensor of logits."""

LOSSES: dict[str, KDLoss | None] = {
    "lm": None,
    **{name: KDLoss(name) for name in DIVERGENCES},
    "mixed": KDLoss(ce_weight=0.5),
    "top-k": KDLoss(top_k=50),
}


def extra_peak(topology: Topology, loss: str, chunk: int | None = None, dtype: torch.dtype = torch.float32) -> float:
    """Return the peak of live bytes in a loss and its backward, without gradients, in units of local fp32 logits."""
    held, sequence = VOCAB // topology.tp, TOKENS // (topology.tp if topology.sequence_parallel else 1)
    hidden, teacher_hidden = (torch.randn(sequence, 1, WIDTH, dtype=dtype) for _ in range(2))
    weight, teacher_weight = (torch.randn(held, WIDTH, dtype=dtype) for _ in range(2))
    hidden.requires_grad_()
    weight.requires_grad_()
    labels, mask = torch.randint(0, VOCAB, (1, TOKENS)), torch.ones(1, TOKENS, dtype=torch.bool)
    vocabulary = Vocabulary(VOCAB, topology.tp_group, topology.sequence_parallel)
    student, teacher = Output(hidden, weight), Output(teacher_hidden, teacher_weight)
    with LivePeak() as meter:
        if loss == "unfused":
            logits = hidden.flatten(0, 1) @ weight.t()
            torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum").backward()
        elif (kd := LOSSES[loss]) is None:
            lm_loss(student, labels, mask, vocabulary, chunk=chunk).backward()
        else:
            distill_loss(student, teacher, mask, vocabulary, loss=kd, labels=labels, chunk=chunk).backward()
    assert hidden.grad is not None and weight.grad is not None
    return (meter.extra - hidden.grad.nbytes - weight.grad.nbytes) / (4 * TOKENS * held)


@each_layout
@pytest.mark.parametrize("loss", LOSSES)
def test_the_extra_peak_is_at_most_a_quarter_of_the_logits(pool: Pool, loss: str, layout: dict[str, Any]) -> None:
    for found in pool.run(extra_peak, loss, **layout):
        assert 0 < found <= BOUND


def test_the_meter_sees_logits_where_they_exist(pool: Pool) -> None:
    assert pool.run(extra_peak, "unfused")[0] > 2


@pytest.mark.parametrize("loss", LOSSES)
def test_the_chunk_sets_the_peak(pool: Pool, loss: str) -> None:
    """Check the peak against the number of live tensors that the loss declares."""
    kd = LOSSES[loss]
    [few] = pool.run(extra_peak, loss, 32)
    [more] = pool.run(extra_peak, loss, 64)
    assert 0 < more - few <= (kd.live if kd else 2) * 32 / TOKENS * 1.1


def test_bf16_takes_no_second_gradient(pool: Pool) -> None:
    """Allowed besides the returned bf16 gradient: its fp32 sum (twice its size), and the memory of an fp32 loss."""
    [found] = pool.run(extra_peak, "forward_kl", None, torch.bfloat16)
    assert 0 < found <= BOUND + WIDTH / TOKENS
