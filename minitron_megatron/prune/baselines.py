"""Baseline plans, made without scores: importance has to beat them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ..layout import Shape
from ..records import Plan
from .choose import best_plan, checked_sizes

__all__ = ["first_plan", "random_plan"]


def random_plan(shape: Shape, seed: int, *, layers: Sequence[int] | None = None, **sizes: int) -> Plan:
    """Keep randomly drawn units: independent draws per layer, and the same number of heads in each kv_group.

    The draw of a unit depends only on the seed and on its axis, layer and index. layers: the layers to keep; None: all.
    Raises PlanError as `choose` does.
    """

    def draw(name: str, units: int) -> list[float]:
        numbers = random.Random(f"{seed} {name}")
        return [numbers.random() for _ in range(units)]

    return _plan(shape, draw, layers, sizes)


def first_plan(shape: Shape, *, layers: Sequence[int] | None = None, **sizes: int) -> Plan:
    """Keep the first units of each axis, and the first heads of each kv_group. Otherwise like `random_plan`."""
    return _plan(shape, lambda name, units: [0.0] * units, layers, sizes)


def _plan(
    shape: Shape,
    draw: Callable[[str, int], list[float]],
    layers: Sequence[int] | None,
    sizes: dict[str, int],
) -> Plan:
    """Make a plan from drawn scores. draw: (name of an axis and layer, number of units) -> score of each unit."""
    sizes = checked_sizes(shape, sizes)
    plan = best_plan(
        shape,
        lambda axis, places: {
            at: torch.tensor(draw(f"{axis} {at}", shape.units(axis)), dtype=torch.float64) for at in places
        },
        layers,
        sizes,
    )
    return replace(plan, margins={})
