"""Small hidden states and output weights, reference losses in float64 with all logits at once, and the check that the
fused losses equal them, in value and gradients, at every split of the vocabulary and the sequence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minitron_megatron.losses import KDLoss, Output, Vocabulary, distill_loss, lm_loss
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool

SEQUENCE, BATCH, HIDDEN, TEACHER_HIDDEN, ROWS = 12, 3, 10, 14, 64

each_layout = pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"tp": 1}, id="tp1"),
        pytest.param({"tp": 2}, id="tp2"),
        pytest.param({"tp": 2, "sequence_parallel": True}, id="tp2-sp"),
    ],
)


@dataclass(frozen=True)
class Case:
    loss: KDLoss | None = None
    """Distillation loss; None: cross-entropy only."""
    vocab: int = 50
    """Vocabulary entries among ROWS rows; the rest are padding, filled with numbers that would change the result."""
    teacher_rows: int = ROWS
    counted: float = 0.7
    """Fraction of the tokens whose mask is true."""
    chunk: int | None = 5
    upstream: float = 1.0
    """Gradient of the loss."""
    spread: float = 1.0
    """Scale of the hidden states."""
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Data:
    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    mask: Tensor

    def to(self, dtype: torch.dtype) -> Data:
        floats = ("hidden", "weight", "teacher_hidden", "teacher_weight")
        return replace(self, **{name: getattr(self, name).to(dtype) for name in floats})


def make_data(case: Case) -> Data:
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mask = torch.rand(BATCH, SEQUENCE, generator=generator) < case.counted
    labels = torch.randint(0, case.vocab, (BATCH, SEQUENCE), generator=generator)
    data = Data(
        hidden=normal(SEQUENCE, BATCH, HIDDEN) * case.spread,
        weight=normal(ROWS, HIDDEN),
        teacher_hidden=normal(SEQUENCE, BATCH, TEACHER_HIDDEN) * case.spread,
        teacher_weight=normal(case.teacher_rows, TEACHER_HIDDEN),
        labels=torch.where(mask, labels, -100),
        mask=mask,
    )
    data.weight[case.vocab :] = data.teacher_weight[case.vocab :] = 9.0
    return data.to(case.dtype)


def naive(loss: KDLoss, student: Tensor, teacher: Tensor) -> Tensor:
    """Return a divergence of logits [n, V], summed over the tokens, with torch's own functions."""
    x, y = student / loss.temperature, teacher / loss.temperature
    if loss.top_k:
        likeliest = y.topk(loss.top_k).indices
        x, y = x.gather(-1, likeliest), y.gather(-1, likeliest)
    log_p, log_q = x.log_softmax(-1), y.log_softmax(-1)
    if loss.divergence == "forward_kl":
        return F.kl_div(log_p, log_q, reduction="sum", log_target=True)
    if loss.divergence == "reverse_kl":
        return F.kl_div(log_q, log_p, reduction="sum", log_target=True)
    if loss.divergence == "jsd":
        beta = 0.5 if loss.beta is None else loss.beta
        log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
        of_teacher, of_student = (F.kl_div(log_m, each, reduction="sum", log_target=True) for each in (log_q, log_p))
        return beta * of_teacher + (1 - beta) * of_student
    if loss.divergence == "mse":
        return F.mse_loss(x, y, reduction="none").mean(-1).sum()
    assert loss.divergence == "cosine"
    return (1 - F.cosine_similarity(x, y)).sum()


def truth(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, gradient of the hidden states, gradient of the output weight), with all logits at once."""
    data = make_data(case).to(dtype)
    hidden, weight = data.hidden.requires_grad_(), data.weight.requires_grad_()
    counted = data.mask.t()  # in the layout of the hidden states: [s, b]
    logits = hidden[counted] @ weight[: case.vocab].t()
    cross_entropy = F.cross_entropy(logits, data.labels.t()[counted], reduction="sum")
    if case.loss is None:
        loss = cross_entropy
    else:
        teacher = data.teacher_hidden[counted] @ data.teacher_weight[: case.vocab].t()
        loss = naive(case.loss, logits, teacher) + case.loss.ce_weight * cross_entropy
    (loss * case.upstream).backward()
    assert hidden.grad is not None and weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


def cut(tensor: Tensor, rank: int, world: int) -> Tensor:
    return tensor.chunk(world)[rank].clone()


def fused(topology: Topology, case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return this rank's (loss, its parts of both gradients, loss under no_grad)."""
    data, rank, tp = make_data(case), topology.tp_rank, topology.tp
    over_sequence = tp if topology.sequence_parallel else 1
    place = rank if topology.sequence_parallel else 0
    hidden = cut(data.hidden, place, over_sequence).requires_grad_()
    weight = cut(data.weight, rank, tp).requires_grad_()
    vocabulary = Vocabulary(case.vocab, topology.tp_group, topology.sequence_parallel)
    options: dict[str, Any] = {"chunk": case.chunk}

    def loss() -> Tensor:
        if case.loss is None:
            return lm_loss(Output(hidden, weight), data.labels, data.mask, vocabulary, **options)
        teacher = Output(cut(data.teacher_hidden, place, over_sequence), cut(data.teacher_weight, rank, tp))
        models = Output(hidden, weight), teacher
        return distill_loss(*models, data.mask, vocabulary, loss=case.loss, labels=data.labels, **options)

    value = loss()
    (value * case.upstream).backward()
    assert hidden.grad is not None and weight.grad is not None
    assert (value.dtype, value.shape) == (torch.float32, ())
    assert (hidden.grad.dtype, weight.grad.dtype) == (case.dtype, case.dtype)
    with torch.no_grad():
        return value.detach(), hidden.grad, weight.grad, loss()


def fused_each(topology: Topology, cases: Sequence[Case]) -> list[tuple[Tensor, ...]]:
    return [fused(topology, case) for case in cases]


def assert_close(got: Tensor, want: Tensor, relative: float, name: str, slack: float = 0.0) -> None:
    """Check that every element is within `relative` times the largest one, plus `slack`."""
    assert torch.isfinite(got).all(), name
    assert (got.double() - want).abs().max() <= relative * want.abs().max() + slack, name


def assert_fused_equals_truth(
    pool: Pool, layout: dict[str, Any], relative: float, *cases: Case, rounding: float = 0.0
) -> None:
    """Check the fused loss against the truth, allowing also `rounding` times the fp32 error of the unfused loss."""
    for case, results in zip(cases, zip(*pool.run(fused_each, cases, **layout), strict=True), strict=True):
        wanted = truth(case)
        plain = truth(case, torch.float32) if rounding else wanted
        slack = [rounding * float((a - b).abs().max()) for a, b in zip(plain, wanted, strict=True)]
        values, hidden, weight, without = zip(*results, strict=True)
        assert all(torch.equal(value, values[0]) for value in (*values, *without)), case
        assert_close(values[0], wanted[0], relative, f"value of {case}", slack[0])
        for part in [torch.cat(hidden)] if "sequence_parallel" in layout else hidden:
            assert_close(part, wanted[1], relative, f"states' gradient of {case}", slack[1])
        assert_close(torch.cat(weight), wanted[2], relative, f"weight's gradient of {case}", slack[2])
        assert not torch.cat(weight)[case.vocab :].any(), case
