"""Every divergence against torch's in float64: with temperature, teacher top-k, cross-entropy, different padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from minitron_megatron.errors import RecipeError
from minitron_megatron.losses import (
    DIVERGENCES,
    Entries,
    KDLoss,
    Output,
    Vocabulary,
    chunk_tokens,
    distill_loss,
)
from minitron_megatron.losses.divergences import JSD, divergence_named
from minitron_megatron.losses.shortlist import Shortlist, likeliest
from minitron_megatron.parallel import Topology
from minitron_megatron.testing import Pool, tolerance
from tests.losses.cases import Case, assert_close, assert_fused_equals_truth, each_layout, fused, make_data, naive

each_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)

LOSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "warm": {"temperature": 2.5},
    "cold": {"temperature": 0.4},
    "top 7": {"top_k": 7},
    "top 40, more than a rank has": {"top_k": 40},
    "the whole vocabulary as top-k": {"top_k": 50},
    "with cross-entropy": {"ce_weight": 0.6},
    "all of it": {"temperature": 1.7, "top_k": 9, "ce_weight": 1.3},
}


@each_layout
@each_divergence
def test_value_and_gradients_equal_the_unfused_truth(pool: Pool, divergence: str, layout: dict[str, Any]) -> None:
    cases = [Case(KDLoss(divergence, **keys), upstream=0.7) for keys in LOSSES.values()]
    assert_fused_equals_truth(pool, layout, tolerance()["rtol"], *cases)


@each_layout
def test_beta_is_the_teachers_share_of_the_mixture(pool: Pool, layout: dict[str, Any]) -> None:
    cases = [Case(KDLoss("jsd", beta=beta)) for beta in (0.1, 0.9)]
    assert_fused_equals_truth(pool, layout, tolerance()["rtol"], *cases)


@each_layout
@each_divergence
def test_padding_masks_and_chunks_change_nothing(pool: Pool, divergence: str, layout: dict[str, Any]) -> None:
    """Includes a vocabulary of 30, with which the second rank has only padding."""
    changes: list[dict[str, Any]] = [{"vocab": 30}, {"counted": 1.0, "chunk": 1}, {"chunk": None}, {"counted": 0.03}]
    losses = (KDLoss(divergence, ce_weight=0.5), KDLoss(divergence, top_k=20))
    cases = [Case(loss, **change) for loss in losses for change in changes]
    assert_fused_equals_truth(pool, layout, tolerance()["rtol"], *cases)


@each_layout
def test_teacher_and_student_may_be_padded_unlike(pool: Pool, layout: dict[str, Any]) -> None:
    """At TP2, the two vocabularies are then split at different entries."""
    losses = (KDLoss(ce_weight=0.5), KDLoss("mse"), KDLoss(top_k=9))
    cases = [Case(loss, teacher_rows=rows) for loss in losses for rows in (52, 80, 128)]
    assert_fused_equals_truth(pool, layout, tolerance()["rtol"], *cases)


@each_layout
def test_bf16_is_as_near_as_bf16_can_be(pool: Pool, layout: dict[str, Any]) -> None:
    """Without top-k, since rounded logits select other entries."""
    cases = [Case(KDLoss(name, ce_weight=0.5), dtype=torch.bfloat16) for name in DIVERGENCES]
    assert_fused_equals_truth(pool, layout, tolerance(torch.bfloat16)["rtol"], *cases)


@each_layout
def test_logits_in_the_hundreds_overflow_nowhere(pool: Pool, layout: dict[str, Any]) -> None:
    """A certain student makes gradients with factor p differences of nearly equal numbers, inaccurate in any fp32."""
    cases = [Case(KDLoss(name, top_k=top_k), spread=100.0) for name in DIVERGENCES for top_k in (None, 7)]
    assert_fused_equals_truth(pool, layout, 1e-4, *cases, rounding=10)


@each_divergence
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_equal_logits_have_no_gradient_at_all(divergence: str, spread: float) -> None:
    logits = spread * torch.randn(64, 131, generator=torch.Generator().manual_seed(3))
    value, gradient = divergence_named(divergence)(logits.clone(), logits.clone(), Shortlist(131))
    assert not gradient.any()
    assert value.abs().max() < 1e-6


@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name != "mse"])
def test_over_one_entry_there_is_no_gradient_at_all(divergence: str) -> None:
    """Softmax over one entry is 1, and the direction of a single number is its sign."""
    student, teacher = torch.randn(2, 256, 1, generator=torch.Generator().manual_seed(4))
    _, gradient = divergence_named(divergence)(student, teacher, Shortlist(1))
    assert not gradient.any()


@each_divergence
def test_the_chunk_changes_the_result_by_roundings_alone(pool: Pool, divergence: str) -> None:
    results = [pool.run(fused, Case(KDLoss(divergence, ce_weight=0.5), chunk=chunk))[0] for chunk in (1, 7, 1000)]
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            assert_close(found, expected.double(), tolerance()["rtol"], divergence)


def tied(topology: Topology, divergence: str) -> tuple[Tensor, Tensor]:
    """Return the gradient of a weight that is also used as the embedding, and that gradient plus the loss's own."""
    data = make_data(Case())
    rows = torch.randint(0, 50, (12, 3), generator=torch.Generator().manual_seed(0))
    weight = (data.weight / 3).requires_grad_()
    distill_loss(
        Output(weight[rows], weight),
        Output(data.teacher_hidden, data.teacher_weight),
        data.mask,
        Vocabulary(50, topology.tp_group),
        loss=KDLoss(divergence),
    ).backward()
    assert weight.grad is not None
    found, weight.grad = weight.grad, None
    exact = data.to(torch.float64)
    table = weight.detach().double().requires_grad_()
    logits = table[rows][data.mask.t()] @ table[:50].t()
    naive(KDLoss(divergence), logits, exact.teacher_hidden[data.mask.t()] @ exact.teacher_weight[:50].t()).backward()
    assert table.grad is not None
    return found, table.grad


@each_divergence
def test_a_tied_weight_gets_both_gradients(pool: Pool, divergence: str) -> None:
    [(found, expected)] = pool.run(tied, divergence)
    assert_close(found, expected, 1e-5, divergence)


# ---- top-k of the teacher


def ties(topology: Topology, size: int) -> Tensor:
    logits = torch.tensor(
        [[1.0, 3.0, -0.0, 3.0, 0.0, 3.0, -2.0, 1.0], [-1.0, -1.0, -3.0, -1.0, -3.0, -1.0, -1.0, -2.0]]
    )
    held = 8 // topology.tp
    start = topology.tp_rank * held
    return likeliest(logits[:, start : start + held], size, Vocabulary(8, topology.tp_group), start)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_of_equal_logits_the_lower_entry_comes_first_at_every_tp(pool: Pool, tp: int) -> None:
    expected = [[1, 3, 5, 0, 7, 2, 4, 6], [0, 1, 3, 5, 6, 7, 2, 4]]
    for size in (1, 2, 5, 8):
        for found in pool.run(ties, size, tp=tp):
            assert found.tolist() == [row[:size] for row in expected]


# ---- invalid settings


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"divergence": "reverse_k"}, r"divergence 'reverse_k' is not known\. Did you mean 'reverse_kl'\? Known: "),
        ({"divergence": "mse", "beta": 0.5}, r"divergence 'mse' has no beta\. Leave beta out\."),
        ({"divergence": "jsd", "beta": 1.0}, r"beta is 1\.0: should be less than 1"),
        ({"temperature": 0.0}, r"temperature is 0\.0: should be greater than 0"),
        ({"top_k": 0}, "top_k is 0: should be greater than 0"),
        ({"ce_weight": -1.0}, r"ce_weight is -1\.0: should be greater than or equal to 0"),
    ],
)
def test_a_loss_that_cannot_be_is_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        KDLoss(**keys)


def without_labels(topology: Topology) -> None:
    data = make_data(Case())
    distill_loss(
        Output(data.hidden, data.weight),
        Output(data.teacher_hidden, data.teacher_weight),
        data.mask,
        Vocabulary(50, topology.tp_group),
        loss=KDLoss(ce_weight=1.0),
    )


def test_cross_entropy_without_labels_is_refused(pool: Pool) -> None:
    with pytest.raises(RecipeError, match=r"^ce_weight is .*, but the loss was given no labels\. Pass labels\."):
        pool.run(without_labels)


def test_a_vocabulary_that_is_not_shared_is_refused(pool: Pool) -> None:
    with pytest.raises(
        RecipeError, match=r"the teacher has 48 rows .* fewer than the 50 .* only their padding may differ"
    ):
        pool.run(fused, Case(KDLoss(), teacher_rows=48), tp=2)
    with pytest.raises(RecipeError, match=r"^`top_k` is 51, but there are 50 vocabulary entries\. Ask for fewer\."):
        pool.run(fused, Case(KDLoss(top_k=51)), tp=2)


# ---- a user's own divergence


@dataclass(frozen=True)
class Absolute:
    """Summed absolute difference of the logits."""

    scale: float = 1.0
    live: ClassVar[int] = 2

    def __call__(self, student: Tensor, teacher: Tensor, entries: Entries) -> tuple[Tensor, Tensor]:
        difference = student - teacher
        return self.scale * difference.abs().sum(-1), self.scale * difference.sign()


def absolute(topology: Topology) -> tuple[Tensor, ...]:
    DIVERGENCES["absolute"] = f"{__name__}:Absolute"
    try:
        return fused(topology, Case(KDLoss("absolute")))
    finally:
        del DIVERGENCES["absolute"]


def test_a_divergence_of_somebody_elses_is_found_by_its_line(pool: Pool) -> None:
    data = make_data(Case()).to(torch.float64)
    counted, hidden, weight = data.mask.t(), data.hidden.requires_grad_(), data.weight.requires_grad_()
    teacher = data.teacher_hidden[counted] @ data.teacher_weight[:50].t()
    loss = (hidden[counted] @ weight[:50].t() - teacher).abs().sum()
    loss.backward()
    assert hidden.grad is not None
    for value, d_hidden, *_ in pool.run(absolute, tp=2):
        assert_close(value, loss.detach(), 1e-5, "value")
        assert_close(d_hidden, hidden.grad, 1e-5, "gradient")


# ---- chunk size


@pytest.mark.parametrize("live", [2, 5])
@pytest.mark.parametrize("held", [1000, 128256, 16032, 0])
def test_the_chosen_chunk_keeps_within_its_budget(held: int, live: int) -> None:
    chunk = chunk_tokens(4096, held, live, budget_bytes=2**26)
    assert chunk == 32 or live * 4 * chunk * held <= 2**26 < live * 4 * (chunk + 1) * max(held, 1)


def test_by_default_the_budget_is_an_eighth_of_the_logits() -> None:
    chunk = chunk_tokens(4096, 32768, 4)
    assert 4 * chunk * 4 * 32768 == 4096 * 4 * 32768 // 8
    assert chunk_tokens(10**6, 32768, 4) * 4 * 4 * 32768 == 2**30


def test_a_mixture_without_one_of_its_parts_names_its_limits() -> None:
    with pytest.raises(RecipeError) as caught:
        JSD(beta=1.0)
    assert str(caught.value) == ("beta is 1.0. It must lie between 0 and 1; forward_kl and reverse_kl are its limits.")
