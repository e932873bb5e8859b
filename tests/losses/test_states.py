"""Losses of hidden states equal those of plain torch in float64, in value and gradient."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minitron_megatron.losses import attach_loss, relation_loss, state_loss
from tests.losses.cases import assert_close

SEQUENCE, BATCH = 9, 3
NAIVE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cosine": lambda student, teacher: (1 - F.cosine_similarity(student, teacher, dim=-1)).sum(),
    "mse": lambda student, teacher: sum(F.mse_loss(a, b) for a, b in zip(student, teacher, strict=True)),  # type: ignore[misc]
}


def draw(channels: int, seed: int) -> Tensor:
    return torch.randn(SEQUENCE, BATCH, channels, generator=torch.Generator().manual_seed(seed))


def counted() -> Tensor:
    return torch.rand(SEQUENCE, BATCH, generator=torch.Generator().manual_seed(9)) < 0.7


def with_gradients(loss: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    """Return the loss and the gradient of each leaf."""
    leaves = tuple(leaf.clone().requires_grad_() for leaf in leaves)
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def expect_equal(found: list[Tensor], truth: list[Tensor], relative: float = 1e-5) -> None:
    for number, (got, want) in enumerate(zip(found, truth, strict=True)):
        assert_close(got, want, relative, f"result {number}")


@pytest.mark.parametrize("loss", NAIVE)
@pytest.mark.parametrize("nearness", [0.0, 0.999])
def test_a_state_loss_is_plain_torchs(loss: str, nearness: float) -> None:
    """Includes states that nearly agree, for which 1 - cos in fp32 would be noise."""
    student, mapped, counts = draw(6, 1), torch.randn(8, 6, generator=torch.Generator().manual_seed(2)) / 3, counted()
    teacher = torch.lerp(draw(8, 3), student @ mapped.t(), nearness)
    found = with_gradients(lambda s, w: state_loss(s, teacher, counts, loss, lambda x: x @ w.t()), student, mapped)
    truth = with_gradients(
        lambda s, w: NAIVE[loss]((s @ w.t())[counts], teacher.double()[counts]), student.double(), mapped.double()
    )
    expect_equal(found, truth, 1e-5 if nearness == 0 else 1e-3)
    assert found[0] == pytest.approx(float(truth[0]), rel=1e-5 if nearness == 0 else 1e-3)


def test_no_token_that_counts_is_no_loss() -> None:
    counts = torch.zeros(SEQUENCE, BATCH, dtype=torch.bool)
    for loss in NAIVE:
        value, gradient = with_gradients(
            lambda s, loss=loss: state_loss(s, draw(6, 2), counts, loss, lambda x: x), draw(6, 1)
        )
        assert value == 0 and not gradient.any()
    value, gradient = with_gradients(lambda s: relation_loss(s, draw(6, 2), counts, 2), draw(6, 1))
    assert value == 0 and not gradient.any()


def naive_relations(student: Tensor, teacher: Tensor, counts: Tensor, heads: int) -> Tensor:
    """Return the relation loss, computed for one token and one head at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for token, sample in counts.nonzero().tolist():
        for head in range(heads):
            logs = []
            for states in (student, teacher):
                width = states.shape[-1] // heads
                part = states[: token + 1, sample, head * width : (head + 1) * width]
                logs.append((part @ part[token] / math.sqrt(width)).log_softmax(0))
            total = total + F.kl_div(*logs, log_target=True, reduction="sum")
    return total


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_a_relation_loss_is_plain_torchs(heads: int) -> None:
    """Student and teacher differ in width; masked tokens have no row of their own, but appear in later tokens' rows."""
    student, teacher, counts = draw(8, 1), draw(12, 2), counted()
    found = with_gradients(lambda s: relation_loss(s, teacher, counts, heads), student)
    truth = with_gradients(lambda s: naive_relations(s, teacher.double(), counts, heads), student.double())
    expect_equal(found, truth)


def test_what_is_minimised_besides_changes_the_gradient_alone() -> None:
    def loss(states: Tensor) -> Tensor:
        passed = attach_loss(states, states.square().sum(), torch.tensor(0.5))
        assert torch.equal(passed, states)
        return passed.sum()

    states = draw(4, 1)
    value, gradient = with_gradients(loss, states)
    assert value == states.sum()
    torch.testing.assert_close(gradient, 1 + states)
