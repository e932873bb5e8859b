"""Light distillation of several candidates: all to the end, or the better half of them after each rung."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

__all__ = ["Curve", "halving", "rungs"]

Curve = Mapping[int, float]
"""Step -> loss on held-out text, nats per token."""

TrainAll = Callable[[Sequence[str], int], Mapping[str, Curve]]
"""(candidates, step) -> their curves, each trained up to that step from wherever it stands."""


def rungs(steps: int, halvings: int) -> list[int]:
    """The steps after which candidates are compared: the last, and before it half of each, as often as asked."""
    found = [steps]
    for _ in range(halvings):
        found.insert(0, max(1, found[0] // 2))
    return sorted(set(found))


def halving(names: Sequence[str], at: Sequence[int], train_all: TrainAll) -> dict[str, Curve]:
    """The curves of all that took part. After each step of `at` but the last the worse half leaves, of equals the
    later."""
    curves: dict[str, Curve] = {}
    left = list(names)
    for number, step in enumerate(at):
        curves |= train_all(left, step)
        if number + 1 < len(at):
            order = sorted(left, key=lambda name: _loss(curves[name], step))
            stay = set(order[: math.ceil(len(order) / 2)])
            left = [name for name in left if name in stay]
    return curves


def _loss(curve: Curve, step: int) -> float:
    loss = curve[step]
    return loss if math.isfinite(loss) else math.inf
