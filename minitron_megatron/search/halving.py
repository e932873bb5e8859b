"""Short distillation of candidates with successive halving: after each rung only the better half goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

__all__ = ["Curve", "halving", "rungs"]

Curve = Mapping[int, float]
"""Step -> loss on held-out text, nats per token."""

TrainAll = Callable[[Sequence[str], int], Mapping[str, Curve]]
"""(candidates, step) -> their curves, each candidate trained up to that step from its latest state."""


def rungs(steps: int, halvings: int) -> list[int]:
    """Return the steps after which candidates are compared: `steps`, and `halvings` times half of the next one."""
    found = [steps]
    for _ in range(halvings):
        found.insert(0, max(1, found[0] // 2))
    return sorted(set(found))


def halving(names: Sequence[str], at: Sequence[int], train_all: TrainAll) -> dict[str, Curve]:
    """Run successive halving and return the curves of all candidates, also of those that were dropped.

    After each step of `at` except the last, the worse half is dropped; of equal candidates the later one.
    """
    curves: dict[str, Curve] = {}
    left = list(names)
    for number, step in enumerate(at):
        curves |= train_all(left, step)
        if number + 1 < len(at):
            order = sorted(left, key=lambda name: _loss(curves[name], step))
            kept = set(order[: math.ceil(len(order) / 2)])
            left = [name for name in left if name in kept]
    return curves


def _loss(curve: Curve, step: int) -> float:
    loss = curve[step]
    return loss if math.isfinite(loss) else math.inf
