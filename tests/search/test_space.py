"""Grids and budgets: the papers' own lists, every rule, and the messages for an empty grid."""

from __future__ import annotations

from typing import Any

import pytest

from minitron_megatron.errors import PlanError, RecipeError
from minitron_megatron.layout import Shape, kv_cache_bytes, parameters
from minitron_megatron.search import FILLED, Conditions, Limit, Roofline, Space, candidates, costs_of

NEMOTRON = {"head_dim": 128, "vocab": 256000, "gated": False, "norm_bias": True, "kv_groups": 8}
TEACHER_15B = Shape(layers=32, hidden=6144, ffn=24576, heads=48, **NEMOTRON)
EXPANSIONS = (2.5, 3.0, 3.5, 4.0)
SPACE_8B = Space({"layers": (29, 30, 31, 32), "heads": (32, 48), "hidden": (4096, 4608, 5120, 5632, 6144)}, EXPANSIONS)
SPACE_4B = Space(
    {"layers": (29, 30, 31, 32), "heads": (24, 32, 48), "hidden": (2560, 3072, 3584, 4096, 4608)}, EXPANSIONS
)
# Table 19 of the first paper, its parameters counted: layers, heads, ffn, hidden -> parameters
TABLE_19 = {
    (32, 32, 12800, 5120): 8_494_131_200,
    (32, 32, 13824, 4608): 7_946_707_968,
    (32, 48, 11520, 4608): 7_871_210_496,
    (32, 48, 16384, 4096): 8_271_699_968,
    (31, 32, 12800, 5120): 8_310_609_920,
    (31, 32, 16128, 4608): 8_430_345_216,
    (31, 48, 13824, 4608): 8_357_207_040,
    (31, 48, 16384, 4096): 8_078_745_600,
    (30, 32, 12800, 5120): 8_127_088_640,
    (30, 32, 16128, 4608): 8_234_505_216,
    (30, 48, 13824, 4608): 8_163_726_336,
    (30, 48, 16384, 4096): 7_885_791_232,
    (29, 32, 12800, 5120): 7_943_567_360,
    (29, 32, 16128, 4608): 8_038_665_216,
    (29, 48, 13824, 4608): 7_970_245_632,
}
ROWS_4B = [
    *[(31, 24, 7680, 3072), (32, 32, 10240, 2560), (29, 32, 7680, 3072), (31, 48, 8960, 2560), (32, 24, 7680, 3072)],
    *[(29, 48, 10240, 2560), (30, 32, 7680, 3072), (29, 24, 9216, 3072), (32, 48, 8960, 2560), (30, 48, 10240, 2560)],
    *[(31, 32, 7680, 3072), (30, 24, 9216, 3072), (31, 48, 10240, 2560), (32, 32, 7680, 3072), (31, 24, 9216, 3072)],
    *[(29, 32, 9216, 3072), (32, 48, 10240, 2560), (32, 24, 9216, 3072)],
]


def rows(space: Space, low: float, high: float) -> dict[tuple[int, ...], int]:
    found = candidates(space, TEACHER_15B, {"params": Limit(low, high)}, Conditions())
    return {(c.shape.layers, c.shape.heads, c.shape.ffn, c.shape.hidden): int(c.costs["params"]) for c in found}


def test_the_papers_grids_and_windows_give_their_lists() -> None:
    assert rows(SPACE_8B, 7.8e9, 8.5e9) == TABLE_19
    four = rows(SPACE_4B, 3.8e9, 4.2e9)
    assert sorted(four) == sorted(ROWS_4B) and len(four) == 18
    assert four[32, 24, 9216, 3072] == 4_190_509_056


def test_the_grids_have_the_papers_sizes_and_never_the_teacher() -> None:
    everything = {"params": Limit(at_least=1)}
    assert len(candidates(SPACE_8B, TEACHER_15B, everything, Conditions())) == 160 - 1
    assert len(candidates(SPACE_4B, TEACHER_15B, everything, Conditions())) == 240


def test_the_largest_comes_first_and_names_say_the_sizes() -> None:
    found = candidates(SPACE_8B, TEACHER_15B, {"params": Limit(7.8e9, 8.5e9)}, Conditions())
    sizes = [each.costs["params"] for each in found]
    assert sizes == sorted(sizes, reverse=True)
    assert found[0].name == "layers32-hidden5120-ffn12800-heads32"
    assert len({each.name for each in found}) == len(found)


SMALL = Shape(layers=6, hidden=64, ffn=96, heads=8, kv_groups=2, head_dim=8, vocab=100)
MIXTURE = Shape(*(4, 64, 0, 8, 2, 8, 100), gated=True, experts=8, experts_per_token=2, expert_ffn=32)


def test_costs_are_what_their_parts_add_up_to() -> None:
    at = Conditions(batch=3, context=50, weight_bytes=1, kv_bytes=2, speed=Roofline(1e9, 1e12))
    costs = costs_of(MIXTURE, at)
    assert costs["params"] == parameters(MIXTURE)
    expert = 3 * MIXTURE.hidden * MIXTURE.expert_ffn * MIXTURE.layers
    assert costs["active_params"] == parameters(MIXTURE) - 6 * expert
    assert costs["memory_bytes"] == parameters(MIXTURE) + kv_cache_bytes(MIXTURE, 3, 50)
    reached = parameters(MIXTURE) - 8 * expert * (1 - 0.25) ** 3 - MIXTURE.vocab * MIXTURE.hidden
    assert costs["decode_ms"] == pytest.approx((reached + kv_cache_bytes(MIXTURE, 3, 50)) / 1e9 * 1000)
    assert costs["tokens_per_second"] == pytest.approx(3000 / costs["decode_ms"])
    assert "decode_ms" not in costs_of(MIXTURE, Conditions())


def test_every_budget_is_held_and_several_at_once() -> None:
    space = Space({"layers": (2, 4, 6), "hidden": (32, 48, 64), "ffn": (32, 64, 96)})
    at = Conditions(batch=2, context=32, speed=Roofline(1e9, 1e12))
    every = candidates(space, SMALL, {"params": Limit(at_least=1)}, at)
    assert len(every) == 26
    for name in ("params", "active_params", "memory_bytes", "flops_per_token", "decode_ms", "tokens_per_second"):
        middle = sorted(each.costs[name] for each in every)[13]
        limit = Limit(at_least=middle) if name == "tokens_per_second" else Limit(at_most=middle)
        found = candidates(space, SMALL, {name: limit}, at)
        assert {c.name for c in found} == {c.name for c in every if limit.holds(c.costs[name])}
    both = {"params": Limit(20_000, 40_000), "flops_per_token": Limit(at_most=60_000)}
    expected = {c.name for c in every if all(limit.holds(c.costs[name]) for name, limit in both.items())}
    assert 0 < len(expected) < 26
    assert {c.name for c in candidates(space, SMALL, both, at)} == expected


def test_sizes_that_cannot_be_cut_and_other_than_multiples_are_left_out() -> None:
    space = Space({"kv_groups": (1, 2), "heads": (2, 3, 4, 8)}, multiples={"heads": 2})
    found = candidates(space, SMALL, {"params": Limit(at_least=1)}, Conditions())
    pairs = {(c.shape.kv_groups, c.shape.heads) for c in found}
    assert pairs == {(1, 2), (1, 4), (2, 2), (2, 4)}  # one group holds 4 heads; the teacher itself is excluded


def test_hidden_can_be_held_to_what_the_heads_fill() -> None:
    """Heads of size 8: 64 channels need 8 heads, 32 need 4, 48 need 6; whichever axis the grid varies."""
    space = Space({"hidden": (32, 40, 48, 64), "heads": (4, 6, 8)}, multiples={"hidden": FILLED})
    found = candidates(space, SMALL, {"params": Limit(at_least=1)}, Conditions())
    assert [(each.shape.hidden, each.shape.heads) for each in found] == [(48, 6), (32, 4)]
    for sizes in ({"hidden": (32, 48)}, {"heads": (2, 4)}):
        with pytest.raises(RecipeError, match=r"multiples\.hidden: heads x head_dim excludes all"):
            candidates(Space(sizes, multiples={"hidden": FILLED}), SMALL, {"params": Limit(at_least=1)}, Conditions())


WRONG: list[tuple[Space, dict[str, Limit], type[Exception], list[str]]] = [
    (
        Space({"hidden": (80,)}),
        {"params": Limit(at_most=1e4)},
        PlanError,
        ["the search tries `hidden` 80, but the teacher has 64"],
    ),
    (
        Space({"experts": (2,)}),
        {"params": Limit(at_most=1e4)},
        PlanError,
        ["sizes of `experts` are given, but the model does not have this axis. Leave them out."],
    ),
    (
        Space({}),
        {"params": Limit(at_most=1e4)},
        RecipeError,
        ["the search varies no axis. Give sizes for some of layers, hidden, "],
    ),
    (
        Space({"ffn": (32,)}, (2.0,)),
        {"params": Limit(at_most=1e4)},
        RecipeError,
        ["the search has both `ffn` and `expansion`, which is ffn / hidden. Leave one out."],
    ),
    (Space({"hidden": (32,)}), {"params": Limit(at_most=1e9)}, RecipeError, ["nothing needs to be cut", "less"]),
    (
        Space({"hidden": (64,)}),
        {"params": Limit(at_most=1e4)},
        RecipeError,
        ["the search has no combination except the teacher itself. Try other sizes."],
    ),
    (
        Space({"hidden": (32, 48)}),
        {"params": Limit(at_most=1e4)},
        RecipeError,
        ["none of the 2", "budget.params: at most 10,000 excludes all", "The nearest has ", "hidden 32"],
    ),
    (
        Space({"hidden": (32,)}, (2.1,), {"ffn": 16}),
        {"params": Limit(at_most=1e5)},
        RecipeError,
        ["multiples.ffn: 16 excludes all", "nearest ffn is 67", "64 or 80"],
    ),
    (
        Space({"hidden": (32, 40), "heads": (2, 6)}, multiples={"hidden": FILLED}),
        {"params": Limit(at_most=1.5e5)},
        RecipeError,
        [
            "multiples.hidden: heads x head_dim excludes all",
            "nearest hidden is 40, with 6 heads of 8: 48 would pass",
        ],
    ),
    (
        Space({"heads": (3, 5)}),
        {"params": Limit(at_most=1e5)},
        RecipeError,
        ["can be cut", "heads should keep 3", "Keep a multiple of 2"],
    ),
    (
        Space({"hidden": (32, 48)}, (2.1,), {"ffn": 16}),
        {"params": Limit(at_most=1e3)},
        RecipeError,
        ["several rules exclude each other", "multiples.ffn: 16 the last ones"],
    ),
    (
        Space({"hidden": (32,)}),
        {"decode_ms": Limit(at_most=1)},
        RecipeError,
        ["a budget in time needs the speed of the machine. Set `gpu` or `table`."],
    ),
]


@pytest.mark.parametrize(("space", "budget", "kind", "message_parts"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_what_is_wrong_is_said_with_what_would_do(
    space: Space, budget: dict[str, Any], kind: type[Exception], message_parts: list[str]
) -> None:
    with pytest.raises(kind) as caught:
        candidates(space, SMALL, budget, Conditions())
    for words in message_parts:
        assert words in str(caught.value)
    assert str(caught.value).count(". ") <= 2
