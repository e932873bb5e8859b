"""Plans without scores: deterministic by seed, equally many units in each group, uniform over units."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import Any

import pytest

from minitron_megatron.errors import PlanError
from minitron_megatron.layout import Shape
from minitron_megatron.prune import first_plan, random_plan
from minitron_megatron.records import Plan

SHAPE = Shape(layers=4, hidden=12, ffn=16, heads=12, kv_groups=3, head_dim=4, vocab=11)
SIZES = {"hidden": 7, "ffn": 5, "heads": 6}


@pytest.mark.parametrize("layers", [None, (0, 1, 3)])
def test_a_seed_is_a_plan(layers: tuple[int, ...] | None) -> None:
    plan = random_plan(SHAPE, 1, layers=layers, **SIZES)
    assert plan == random_plan(SHAPE, 1, layers=layers, **dict(reversed(SIZES.items())))
    assert plan.target == SHAPE.resized(layers=len(plan.kept_layers), **SIZES)
    assert (plan.layers, plan.margins, plan.model_hash) == (layers, {}, "")
    drawn = {axis: list(layers.values()) for axis, layers in plan.keep.items()}
    assert drawn != {axis: list(layers.values()) for axis, layers in random_plan(SHAPE, 2, **SIZES).keep.items()}
    for axis in ("ffn", "heads"):
        assert list(plan.keep[axis]) == list(plan.kept_layers)
        assert len(set(drawn[axis])) > 1, "each layer draws its own"


def test_the_draw_stays_what_it_is() -> None:
    """Plans of older versions are reproduced."""
    plan = random_plan(SHAPE, 1, **SIZES)
    assert plan.keep["hidden"] == {None: (1, 2, 3, 4, 5, 7, 10)}
    assert random_plan(SHAPE, 1, hidden=7, ffn=9).keep["hidden"] == plan.keep["hidden"]
    assert random_plan(SHAPE, 1, layers=(2,), ffn=5).keep["ffn"] == {2: plan.keep["ffn"][2]}


def test_every_choice_is_as_likely() -> None:
    """Over 6000 plans of 12 groups and layers, each pair of a group's four heads is within 5 % of its share."""
    counts: Counter[tuple[int, ...]] = Counter()
    for seed in range(6000):
        for heads in random_plan(SHAPE, seed, heads=6).keep["heads"].values():
            counts.update(tuple(head % 4 for head in heads[2 * g : 2 * g + 2]) for g in range(3))
    assert set(counts) == set(combinations(range(4), 2))
    share = sum(counts.values()) / 6
    assert all(abs(count - share) < 0.05 * share for count in counts.values())


def test_the_first_of_each_group_stay() -> None:
    plan = first_plan(SHAPE, **SIZES)
    layers = range(4)
    assert plan.keep == {
        "hidden": {None: tuple(range(7))},
        "ffn": dict.fromkeys(layers, tuple(range(5))),
        "heads": dict.fromkeys(layers, (0, 1, 4, 5, 8, 9)),
    }
    assert first_plan(SHAPE, layers=(1, 2), ffn=5) == Plan(
        SHAPE, {"ffn": dict.fromkeys((1, 2), tuple(range(5)))}, (1, 2)
    )


def test_what_stays_whole_is_not_in_the_plan() -> None:
    assert random_plan(SHAPE, 0, ffn=16) == first_plan(SHAPE, heads=12, hidden=12) == Plan(SHAPE)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hiden": 3}, "axis 'hiden' is not known"),
        ({"ffn": 17}, "axis ffn should keep 17 of 16"),
        ({"heads": 4}, "cannot be spread evenly over 3 kv_groups"),
        ({"ffn": 3, "layers": (0, 4)}, "axis layers keeps indices from 0 to 4"),
    ],
)
def test_what_cannot_be_kept_is_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        random_plan(SHAPE, 0, **sizes)
    with pytest.raises(PlanError, match=message):
        first_plan(SHAPE, **sizes)
