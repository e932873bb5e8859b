"""Sizes that a recipe implies for a teacher, compared with values computed by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.errors import MinitronError, PlanError, RecipeError, TopologyError
from minitron_megatron.forecast.estimate import estimate
from minitron_megatron.forecast.sizes import DepthSweep, check_pruning, depth_sweep, rounds, sizes_of, student_shape
from minitron_megatron.layout import Shape, flops_per_token
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe
from tests.tiny import SHAPE

Write = Callable[..., Path]
LLAMA_8B = Shape(layers=32, hidden=4096, ffn=14336, heads=32, kv_groups=8, head_dim=128, vocab=128256)


@pytest.mark.parametrize(
    ("prune", "after"),
    [
        ({"hidden": 3072, "ffn": 9216}, [{"hidden": 3072, "ffn": 9216}]),
        (
            {"hidden": 3072, "ffn": 9216, "iterations": 2},
            [{"hidden": 3584, "ffn": 11776}, {"hidden": 3072, "ffn": 9216}],
        ),
        (
            {"ffn": 9216, "heads": 24, "iterations": 4},  # to multiples of 64, and of 8 groups
            [{"ffn": f, "heads": h} for f, h in ((13056, 32), (11776, 24), (10496, 24), (9216, 24))],
        ),
        ({"hidden": 4092, "iterations": 3}, [{"hidden": 4095}, {"hidden": 4093}, {"hidden": 4092}]),
        ({"ffn": 14336, "iterations": 2}, [{"ffn": 14336}] * 2),
    ],
)
def test_rounds_are_even_steps_to_what_is_asked(
    recipe_file: Write, prune: dict[str, Any], after: list[dict[str, int]]
) -> None:
    assert rounds(load_recipe(recipe_file(prune=prune)), LLAMA_8B) == after


def test_heads_with_keys_of_their_own_take_them_along(recipe_file: Write) -> None:
    recipe, teacher = (
        load_recipe(recipe_file(prune={"heads": 4, "iterations": 2, "layers": 3})),
        SHAPE.resized(kv_groups=8),
    )
    shapes = [teacher.resized(layers=3, heads=heads, kv_groups=heads) for heads in (6, 4)]
    assert list(sizes_of(recipe, teacher).rounds) == shapes
    assert student_shape(recipe, teacher) == shapes[-1]


@pytest.mark.parametrize(
    ("prune", "depth", "sweep"),
    [
        ({}, None, None),
        ({"layers": [0, 1]}, None, None),
        ({"layers": 3}, None, DepthSweep("loss", (2,), 0)),
        ({"layers": 3, "contiguous": False}, None, DepthSweep("loss", (1,), 0)),
        ({"layers": 3, "contiguous": False}, {"greedy": True}, DepthSweep("loss", (1,), 2)),
        ({"layers": 3}, {"lengths": [4, 1], "metric": "bi"}, DepthSweep("bi", (1, 2, 4), 0)),
        ({"layers": [0, 1]}, {"greedy": True, "metric": "kl"}, DepthSweep("kl", (1,), 3)),
        ({}, {"lengths": [2, 3]}, DepthSweep("loss", (2, 3), 0)),
        ({"layers": 5}, {}, DepthSweep("loss", (1,), 0)),
    ],
)
def test_layers_are_measured_as_the_plan_needs_and_as_asked(
    recipe_file: Write, prune: dict[str, Any], depth: dict[str, Any] | None, sweep: DepthSweep | None
) -> None:
    recipe = load_recipe(recipe_file(prune=prune, score={"depth": depth}))
    assert depth_sweep(recipe, SHAPE) == sweep


def test_a_number_of_layers_is_a_shape(recipe_file: Write) -> None:
    recipe = load_recipe(recipe_file(prune={"layers": 3, "ffn": 48}))
    assert student_shape(recipe, SHAPE) == SHAPE.resized(layers=3, ffn=48)


@pytest.mark.parametrize(
    ("prune", "score", "kind", "said"),
    [
        ({"layers": 6}, {}, PlanError, "prune.layers is 6, but the teacher has 5 layers. Use 1 to 5."),
        ({"layers": 1}, {}, TopologyError, "1 layer cannot fill 2"),
        ({}, {"statistic": {"neurons": "pre"}}, PlanError, "Score them by `post`"),
        ({}, {"depth": {"lengths": [1, 5]}}, RecipeError, "[1, 5], but the teacher has 5 layers. Use lengths from 1"),
        ({"layers": 3}, {"depth": {"greedy": True, "metric": "bi"}}, RecipeError, "Use metric loss or kl"),
        ({}, {"depth": {"greedy": True}}, RecipeError, "prune.layers keeps all. Set prune.layers, or greedy: false."),
        ({"iterations": 3, "layers": 3}, {}, RecipeError, "prune.iterations is 3, but no width is pruned. Set it"),
        ({"iterations": 3, "ffn": 48, "by": "first"}, {}, RecipeError, "prune.by: first needs no scores. Set it to 1."),
        ({"iterations": 4, "ffn": 60}, {}, TopologyError, "axis ffn has 63 units, which cannot be split over TP=2"),
    ],
)
def test_what_cannot_be_done_is_told_before_the_work(
    recipe_file: Write, prune: dict[str, Any], score: dict[str, Any], kind: type[MinitronError], said: str
) -> None:
    with pytest.raises(kind) as caught:
        check_pruning(load_recipe(recipe_file(prune=prune, score=score)), SHAPE, Topology(tp=2, pp=2))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("prune", "depth", "passes"),
    [
        ({"by": "random", "ffn": 48}, None, []),
        ({"ffn": 48}, None, [5]),
        ({"layers": 3}, None, [5, 5, 0, 1, 2, 3]),
        ({"layers": 3}, {"metric": "bi"}, [5, 5]),
        ({"layers": 2, "contiguous": False}, {"greedy": True}, [5, 5, *range(5), 4, *range(4), 3, *range(3)]),
    ],
)
def test_the_work_of_scoring_is_counted(
    recipe_file: Write, prune: dict[str, Any], depth: dict[str, Any] | None, passes: list[int]
) -> None:
    """passes: layers that run per calibration sample."""

    def flops(prune: dict[str, Any], score: dict[str, Any]) -> int:
        return estimate(load_recipe(recipe_file(prune=prune, score=score))).flops

    score = {"depth": depth, "micro_batch": 2}
    one, two = (flops(prune, score | {"samples": samples}) for samples in (8, 16))
    tokens = 8 * 16
    first, second = (flops_per_token(SHAPE.resized(layers=n), 16) for n in (1, 2))
    assert two - one == tokens * sum(first + (n - 1) * (second - first) for n in passes)  # of none, the output layer


def test_a_round_more_is_a_pass_of_the_smaller_model_more(recipe_file: Write) -> None:
    def flops(iterations: int) -> int:
        return estimate(load_recipe(recipe_file(prune={"hidden": 32, "ffn": 48, "iterations": iterations}))).flops

    assert flops(2) - flops(1) == 16 * 16 * flops_per_token(SHAPE.resized(hidden=40, ffn=56), 16)
