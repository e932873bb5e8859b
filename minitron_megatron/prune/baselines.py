"""Plans that no score chose: what importance has to beat."""

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
    """Keeps units drawn at random, in each layer others, heads inside their kv_group, as many in each.

    What each unit draws depends on nothing but the seed, its axis, layer and number. layers: the layers that stay;
    None: all. Raises PlanError as `choose` does.
    """

    def draw(name: str, units: int) -> list[float]:
        numbers = random.Random(f"{seed} {name}")
        return [numbers.random() for _ in range(units)]

    return _plan(shape, draw, layers, sizes)


def first_plan(shape: Shape, *, layers: Sequence[int] | None = None, **sizes: int) -> Plan:
    """Keeps the first units of each axis, of heads the first of each kv_group. Otherwise as `random_plan`."""
    return _plan(shape, lambda name, units: [0.0] * units, layers, sizes)


def _plan(
    shape: Shape,
    draw: Callable[[str, int], list[float]],
    layers: Sequence[int] | None,
    sizes: dict[str, int],
) -> Plan:
    """draw: (name of an axis and layer, how many units) -> what each is worth."""
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
