"""Fused losses against float64 logits: value and gradients, at every split of the vocabulary and the sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_megatron.losses import KDLoss, Output, Vocabulary, distill_loss, lm_loss
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool, tolerance
from tests.losses.cases import Case, assert_fused_equals_truth, each_layout, fused, make_data

LOSSES = {"lm": None, "kl": KDLoss()}
each_loss = pytest.mark.parametrize("loss", LOSSES)

CASES: dict[str, dict[str, Any]] = {
    "some tokens": {},
    "every token": {"counted": 1.0},
    "one token": {"counted": 0.03},
    "no padding": {"vocab": 64},
    "a rank with nothing but padding": {"vocab": 30},
    "one chunk": {"chunk": 1000},
    "chunks that divide": {"counted": 1.0, "chunk": 9},
    "chunks of one": {"chunk": 1},
    "the chunk it chooses": {"chunk": None},
    "a scaled gradient": {"upstream": 0.37},
}


@each_layout
@each_loss
def test_value_and_gradients_equal_the_unfused_truth(pool: Pool, loss: str, layout: dict[str, Any]) -> None:
    cases = [Case(LOSSES[loss], **changes) for changes in CASES.values()]
    assert_fused_equals_truth(pool, layout, tolerance()["rtol"], *cases)


@each_layout
def test_temperature_divides_both_logits_and_nothing_else(pool: Pool, layout: dict[str, Any]) -> None:
    cases = [Case(KDLoss(temperature=temperature), upstream=2.5) for temperature in (0.5, 3.0)]
    assert_fused_equals_truth(pool, layout, tolerance()["rtol"], *cases)


@each_layout
@each_loss
def test_bf16_is_as_near_as_bf16_can_be(pool: Pool, loss: str, layout: dict[str, Any]) -> None:
    case = Case(LOSSES[loss], dtype=torch.bfloat16)
    assert_fused_equals_truth(pool, layout, tolerance(torch.bfloat16)["rtol"], case)


@each_layout
@each_loss
def test_logits_in_the_hundreds_overflow_nowhere(pool: Pool, loss: str, layout: dict[str, Any]) -> None:
    assert_fused_equals_truth(pool, layout, 1e-4, Case(LOSSES[loss], spread=100.0))


@each_layout
@each_loss
def test_no_counted_token_is_a_loss_of_zero(pool: Pool, loss: str, layout: dict[str, Any]) -> None:
    for value, hidden, weight, without in pool.run(fused, Case(LOSSES[loss], counted=0.0), **layout):
        assert value == without == 0
        assert not hidden.any() and not weight.any()


def against_itself(topology: Topology) -> tuple[Tensor, Tensor]:
    data = make_data(Case())
    hidden, weight = data.hidden.requires_grad_(), data.weight.requires_grad_()
    loss = distill_loss(
        Output(hidden, weight), Output(data.hidden, data.weight), data.mask, Vocabulary(50, topology.tp_group)
    )
    loss.backward()
    assert hidden.grad is not None
    return loss.detach(), hidden.grad


def test_a_model_does_not_differ_from_itself(pool: Pool) -> None:
    [(loss, gradient)] = pool.run(against_itself)
    assert abs(loss) < 1e-5 and gradient.abs().max() < 1e-5


def twice(topology: Topology) -> None:
    data = make_data(Case())
    hidden = data.hidden.requires_grad_()
    loss = lm_loss(Output(hidden, data.weight), data.labels, data.mask, Vocabulary(50, topology.tp_group))
    (loss * 2).backward(retain_graph=True)
    loss.backward()


def test_a_second_backward_is_refused_rather_than_wrong(pool: Pool) -> None:
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        pool.run(twice)
