"""One linear layer's ridge regression against float64 `lstsq`, and the choice of its strength."""

from __future__ import annotations

import pytest
import torch

from minitron_megatron.refit import RIDGES
from minitron_megatron.refit.solve import Problem, ridge_step, solve
from tests.refit.truth import ridge_by_lstsq

GENERATOR = torch.Generator().manual_seed(2)


def normal(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=GENERATOR, dtype=torch.float64)


@pytest.mark.parametrize(("tokens", "rank"), [(200, 12), (200, 5), (7, 12)])
@pytest.mark.parametrize("ridge", [1e-6, 1e-2])
def test_a_step_is_the_ridge_regression(tokens: int, rank: int, ridge: float) -> None:
    """With many tokens, with inputs of a lesser rank, and with fewer tokens than unknowns."""
    x, lacks = normal(tokens, rank) @ normal(rank, 12), normal(tokens, 4)
    step = ridge_step(x.T @ x, lacks.T @ x, ridge)
    assert step is not None
    want = ridge_by_lstsq(x, lacks, ridge)
    assert (step - want).norm() < 1e-6 * want.norm()


def test_inputs_that_are_all_zero_move_nothing() -> None:
    assert ridge_step(torch.zeros(3, 3, dtype=torch.float64), normal(2, 3), 1e-3) is None


def test_the_strength_is_chosen_on_held_out_tokens() -> None:
    """Few noisy tokens want a strong ridge; and where held-out tokens disagree with all, nothing changes."""
    x, truth = [normal(30, 20), normal(4000, 20)], normal(20, 3)
    y = [each @ truth + 3 * normal(len(each), 3) for each in x]
    problem = Problem(
        torch.stack([a.T @ a for a in x]),
        torch.stack([b.T @ a for a, b in zip(x, y, strict=True)]),
        torch.stack([b.square().sum() for b in y]),
    )
    solution = solve(problem, RIDGES, lambda total: total)
    errors = {r: (y[1] - x[1] @ ridge_by_lstsq(x[0], y[0], r).T).square().sum() for r in RIDGES}
    assert solution.ridge == min(errors, key=lambda ridge: errors[ridge])
    assert solution.ridge > 1e-3
    torch.testing.assert_close(solution.after[1], min(errors.values()))
    opposite = Problem(problem.gram, problem.cross * torch.tensor([1.0, -1.0])[:, None, None], problem.square)
    assert solve(opposite, RIDGES, lambda total: total).step is None
