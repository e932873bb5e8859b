"""Ridge regression towards weights that are there, from second moments; its strength chosen on held-out tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RIDGES", "Problem", "Solution", "ridge_step", "solve"]

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Strengths that are tried, relative to the mean diagonal of the Gram matrix."""

JITTERS = 8
"""Times that the ridge is multiplied by 10 where the Cholesky factorisation fails."""

CALIBRATION, HELD_OUT = 0, 1
"""Places of the two kinds of tokens in every sum."""


@dataclass(frozen=True)
class Problem:
    """A linear layer's normal equations; its unknown is the change of the weight rows that this rank solves for.

    Each sum is fp64 and has two entries: calibration tokens, held-out tokens.
    """

    gram: Tensor
    """[2, inputs, inputs]: inputs with inputs."""
    cross: Tensor
    """[2, rows, inputs]: (target - output with the present weights) with inputs."""
    square: Tensor
    """[2]: squares of (target - output with the present weights), over this rank's rows."""

    def error(self, step: Tensor, place: int) -> Tensor:
        """Squared error of a kind of tokens over this rank's rows once `step` is added to the weights: a scalar."""
        change = ((step @ self.gram[place] - 2 * self.cross[place]) * step).sum()
        return (self.square[place] + change).clamp(min=0)


@dataclass(frozen=True)
class Solution:
    """The outcome for one linear layer."""

    step: Tensor | None
    """Change of this rank's rows: fp64 [rows, inputs]; None where none lowers the held-out error."""
    ridge: float | None
    """The strength that was chosen."""
    before: Tensor
    """Squared errors of all rows with the present weights: fp64 [2]."""
    after: Tensor
    """Squared errors of all rows with the new weights: fp64 [2]."""


def solve(problem: Problem, ridges: Sequence[float], total: Callable[[Tensor], Tensor]) -> Solution:
    """Return the step with the least held-out error among `ridges`.

    total: sums a tensor in place over the ranks that solve for the other rows. Collective over them.
    """
    before = total(problem.square.clone())
    best, least = None, before[HELD_OUT]
    for ridge in ridges:
        step = ridge_step(problem.gram[CALIBRATION], problem.cross[CALIBRATION], ridge)
        if step is None:
            continue
        error = total(problem.error(step, HELD_OUT))
        if bool(error < least):
            best, least = (step, ridge), error
    if best is None:
        return Solution(None, None, before, before)
    return Solution(*best, before, torch.stack([total(problem.error(best[0], CALIBRATION)), least]))


def ridge_step(gram: Tensor, cross: Tensor, ridge: float) -> Tensor | None:
    """Return argmin over D of |R - X D'|^2 + ridge mean(diag(X'X)) |D|^2, from X'X and R'X; None where X is zero.

    Rank-deficient inputs and dead units are no error: no weight moves along directions that X does not have.
    """
    scale = gram.diagonal().mean()
    if not bool(scale > 0):
        return None
    for jitter in range(JITTERS):
        damped = gram.clone()
        damped.diagonal().add_(scale * (ridge * 10**jitter))
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            return torch.cholesky_solve(cross.T, factor).T
    return None
