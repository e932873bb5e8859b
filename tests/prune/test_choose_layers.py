"""The removed layers are those that hurt least, and only measured values count."""

from __future__ import annotations

import random
import warnings
from dataclasses import replace

import pytest

from minitron_megatron.errors import PlanError
from minitron_megatron.layout import Shape
from minitron_megatron.prune import choose, choose_layers
from minitron_megatron.records import DepthScores, Plan, Scores, Statistic

LAYERS = 8
SHAPE = Shape(layers=LAYERS, hidden=8, ffn=6, heads=4, kv_groups=2, head_dim=2, vocab=11)


def depth_of(blocks: dict[tuple[int, int], float], greedy: tuple[tuple[int, float], ...] = ()) -> DepthScores:
    return DepthScores(SHAPE, "loss", True, 1.0, blocks, greedy)


def random_depth(*lengths: int, seed: int = 0) -> DepthScores:
    chance = random.Random(seed)
    return depth_of({(first, n): chance.random() for n in lengths for first in range(LAYERS - n + 1)})


def singles(*values: float) -> DepthScores:
    return depth_of({(layer, 1): value for layer, value in enumerate(values)})


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("lower", [True, False])
def test_the_block_that_hurts_least_goes(seed: int, lower: bool) -> None:
    depth = replace(random_depth(1, 3, seed=seed), lower_is_better=lower)
    values = [depth.blocks[first, 3] for first in range(LAYERS - 2)]
    first = values.index((min if lower else max)(values))
    assert choose_layers(depth, keep=5) == (*range(first), *range(first + 3, LAYERS))


@pytest.mark.parametrize("lower", [True, False])
def test_single_layers_that_hurt_least_go(lower: bool) -> None:
    depth = replace(singles(5, 1, 7, 3, 4, 8, 2, 6), lower_is_better=lower)
    kept = (0, 2, 4, 5, 7) if lower else (0, 1, 3, 4, 6)
    assert choose_layers(depth, keep=5, contiguous=False) == kept


def test_layers_taken_one_by_one_go_before_all() -> None:
    depth = replace(singles(5, 1, 7, 3, 4, 8, 2, 6), greedy=((7, 2.0), (1, 3.0), (4, 9.0)))
    assert choose_layers(depth, keep=6, contiguous=False) == (0, 2, 3, 4, 5, 6)
    assert choose_layers(depth, keep=5, contiguous=False) == (0, 2, 3, 5, 6)
    assert choose_layers(depth, keep=4, contiguous=False) == (0, 2, 5, 7)  # four were not taken: each on its own


def test_of_equals_the_first_goes() -> None:
    with pytest.warns(UserWarning, match="the choice of layers has a margin below 1e-05"):
        assert choose_layers(depth_of({(first, 7): 1.0 for first in range(2)}), keep=1) == (7,)
    with pytest.warns(UserWarning, match="another layout may keep other layers"):
        assert choose_layers(singles(*[1.0] * LAYERS), keep=6, contiguous=False) == (2, 3, 4, 5, 6, 7)


@pytest.mark.parametrize(("relative", "warns"), [(1.5e-5, False), (0.5e-5, True)])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_close_choice_warns(relative: float, warns: bool, sign: int) -> None:
    depth = singles(1.0, 1.0 + relative, *range(2, LAYERS))
    if sign < 0:
        depth = replace(depth, blocks={block: -value for block, value in depth.blocks.items()}, lower_is_better=False)
    for contiguous in (True, False):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert choose_layers(depth, keep=LAYERS - 1, contiguous=contiguous) == tuple(range(1, LAYERS))
        assert [warning.filename for warning in caught] == [__file__] * warns


@pytest.mark.parametrize("contiguous", [True, False])
def test_all_may_stay(contiguous: bool) -> None:
    assert choose_layers(depth_of({}), keep=LAYERS, contiguous=contiguous) == tuple(range(LAYERS))


def test_the_choice_is_a_plans() -> None:
    layers = choose_layers(random_depth(2), keep=6)
    assert Plan(SHAPE, layers=layers).target == SHAPE.resized(layers=6)
    scores = Scores({}, SHAPE, Statistic(), samples=1, tokens=1, model_hash="abc")
    assert choose(scores, layers=layers).layers == layers


@pytest.mark.parametrize(
    ("depth", "options", "message"),
    [
        (
            random_depth(1, 2, 4),
            {"keep": 5},
            r"a block of 3 layers is to be removed, but measured were blocks of these lengths: 1, 2, 4",
        ),
        (depth_of({}), {"keep": 5}, r"blocks of these lengths: none\. Measure blocks of 3"),
        (
            random_depth(2),
            {"keep": 5, "contiguous": False},
            r"the layers to be removed one by one are 3, but only 0 were measured greedily\. Measure 3 of them",
        ),
        (random_depth(1), {"keep": 0}, r"axis layers should keep 0 of 8\. Ask for 1 to 8"),
        (random_depth(1), {"keep": 9}, "axis layers should keep 9 of 8"),
    ],
)
def test_what_was_not_measured_cannot_be_chosen(depth: DepthScores, options: dict, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        choose_layers(depth, **options)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("contiguous", [True, False])
def test_a_block_whose_value_is_not_finite_ranks_nothing(value: float, contiguous: bool) -> None:
    with pytest.raises(
        PlanError, match=r"leaving out layers 2 to 2 measured (nan|inf), which cannot be ranked\. Measure it"
    ):
        choose_layers(singles(1.0, 2.0, value, 3.0), keep=LAYERS - 1, contiguous=contiguous)
