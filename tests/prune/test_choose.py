"""The kept units are the best ones by global index; a cut that another layout could make differently is warned of."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from minitron_megatron.errors import PlanError
from minitron_megatron.layout import Shape
from minitron_megatron.prune import choose
from minitron_megatron.records import Scores, Statistic

SHAPE = Shape(layers=4, hidden=12, ffn=16, heads=12, kv_groups=3, head_dim=4, vocab=11)


def scores_of(values: dict[str, dict[int | None, Tensor]], shape: Shape = SHAPE) -> Scores:
    return Scores(values, shape, Statistic(), samples=1, tokens=1, model_hash="abc")


def random_scores(seed: int = 0, few: bool = False) -> Scores:
    """few: only three different numbers, so that almost every cut has ties."""
    generator = torch.Generator().manual_seed(seed)

    def units(size: int) -> Tensor:
        if few:
            return torch.randint(1, 4, (size,), generator=generator).double()
        return torch.rand(size, dtype=torch.float64, generator=generator)

    layers = range(SHAPE.layers)
    return scores_of(
        {"ffn": {i: units(16) for i in layers}, "heads": {i: units(12) for i in layers}, "hidden": {None: units(12)}}
    )


def best(units: list[float], size: int) -> list[int]:
    """Return the best units by sorting: the highest first, of equal ones the lower index."""
    return sorted(range(len(units)), key=lambda i: (-units[i], i))[:size]


def margin(units: list[float], size: int) -> float:
    ranked = sorted(units, reverse=True)
    return (ranked[size - 1] - ranked[size]) / ranked[size - 1]


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("layers", [None, (0, 1, 3)])
def test_the_best_stay_and_of_equals_the_lower(few: bool, layers: tuple[int, ...] | None) -> None:
    scores = random_scores(few=few)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if few else "error")
        plan = choose(scores, layers=layers, hidden=7, ffn=5, heads=6)
    assert plan.layers == layers
    assert plan.model_hash == "abc"
    hidden = scores.values["hidden"][None].tolist()
    assert plan.keep["hidden"] == {None: tuple(sorted(best(hidden, 7)))}
    assert plan.margins["hidden"][None] == pytest.approx(margin(hidden, 7))
    assert list(plan.keep["ffn"]) == list(plan.keep["heads"]) == list(layers or range(4))
    for layer in plan.kept_layers:
        ffn, heads = (scores.values[axis][layer].tolist() for axis in ("ffn", "heads"))
        groups = [heads[4 * g : 4 * g + 4] for g in range(3)]
        assert plan.keep["ffn"][layer] == tuple(sorted(best(ffn, 5)))
        assert plan.margins["ffn"][layer] == pytest.approx(margin(ffn, 5))
        assert plan.keep["heads"][layer] == tuple(sorted(4 * g + i for g in range(3) for i in best(groups[g], 2)))
        assert plan.margins["heads"][layer] == pytest.approx(min(margin(group, 2) for group in groups))


def test_heads_are_ranked_inside_their_groups() -> None:
    """Each group keeps equally many heads, even if one group's heads are all stronger."""
    heads = torch.tensor([9.0, 8, 7, 6, 1, 2, 3, 4, 0.1, 0.4, 0.2, 0.3], dtype=torch.float64)
    plan = choose(scores_of({"heads": dict.fromkeys(range(4), heads)}), heads=6)
    assert plan.keep["heads"] == dict.fromkeys(range(4), (0, 1, 6, 7, 9, 11))
    assert plan.margins["heads"][0] == pytest.approx((8 - 7) / 8)


@pytest.mark.parametrize("layers", [None, (0, 1, 3)])
def test_in_the_whole_network_the_kept_layers_scores_add_up(layers: tuple[int, ...] | None) -> None:
    scores = random_scores()
    plan = choose(scores, layers=layers, scope="network", hidden=7, ffn=5, heads=6)
    assert plan.keep["hidden"] == choose(scores, layers=layers, hidden=7).keep["hidden"]
    sums = {
        axis: [sum(by[layer][i].item() for layer in plan.kept_layers) for i in range(SHAPE.axis_size(axis))]
        for axis, by in scores.values.items()
        if axis != "hidden"
    }
    groups = [sums["heads"][4 * g : 4 * g + 4] for g in range(3)]
    assert plan.keep["ffn"] == dict.fromkeys(plan.kept_layers, tuple(sorted(best(sums["ffn"], 5))))
    heads = tuple(sorted(4 * g + i for g in range(3) for i in best(groups[g], 2)))
    assert plan.keep["heads"] == dict.fromkeys(plan.kept_layers, heads)
    assert plan.margins["ffn"][0] == pytest.approx(margin(sums["ffn"], 5))
    assert plan.keep["ffn"] != choose(scores, layers=layers, ffn=5).keep["ffn"]


def test_what_stays_whole_is_not_in_the_plan() -> None:
    plan = choose(random_scores(), ffn=16, heads=12, hidden=12)
    assert (plan.keep, plan.margins, plan.target) == ({}, {}, SHAPE)
    assert choose(scores_of({}), layers=[1, 2]).target == SHAPE.resized(layers=2)


@pytest.mark.parametrize(("relative", "warns"), [(1.5e-5, False), (0.5e-5, True), (0.0, True)])
def test_a_close_cut_warns(relative: float, warns: bool) -> None:
    units = torch.arange(12, 0, -1, dtype=torch.float64)
    units[7] = units[6] * (1 - relative)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = choose(scores_of({"hidden": {None: units}}), hidden=7)
    assert plan.keep["hidden"][None] == tuple(range(7))
    assert plan.margins["hidden"][None] == pytest.approx(relative, abs=1e-12)
    assert [str(w.message)[:17] for w in caught] == ["the cut of hidden"] * warns
    assert all(w.filename == __file__ for w in caught)


def test_a_close_cut_names_its_layers() -> None:
    units = random_scores().values["ffn"]
    with pytest.warns(UserWarning, match="the cut of ffn of layer 2 has a margin below 1e-05"):
        choose(scores_of({"ffn": {**units, 2: torch.ones(16, dtype=torch.float64)}}), ffn=4)


def test_units_that_never_fired_are_cut_without_a_fuss() -> None:
    """Scores of zero give no NaN margin."""
    with pytest.warns(UserWarning):
        plan = choose(scores_of({"hidden": {None: torch.zeros(12, dtype=torch.float64)}}), hidden=3)
    assert plan.keep["hidden"][None] == (0, 1, 2)
    assert math.isfinite(plan.margins["hidden"][None])


def test_groups_that_stay_are_the_strongest_and_heads_are_theirs() -> None:
    scores = random_scores()
    plan = choose(scores, kv_groups=2, heads=4)
    assert (plan.target.kv_groups, plan.target.heads) == (2, 4)
    for layer, units in scores.values["heads"].items():
        strength = units.view(3, 4).norm(dim=1).tolist()
        groups = sorted(best(strength, 2))
        assert plan.keep["kv_groups"][layer] == tuple(groups)
        assert plan.margins["kv_groups"][layer] == pytest.approx(margin(strength, 2))
        kept = [4 * g + h for g in groups for h in sorted(best(units.view(3, 4)[g].tolist(), 2))]
        assert plan.keep["heads"][layer] == tuple(kept)
    assert choose(scores, kv_groups=1).target.heads == choose(scores, kv_groups=1, heads=4).target.heads == 4


MIXTURE = SHAPE.resized(ffn=0, experts=4, experts_per_token=2, expert_ffn=6, shared_ffn=5)


def test_experts_and_the_best_neurons_of_those_that_stay() -> None:
    generator = torch.Generator().manual_seed(3)
    values = {
        axis: {i: torch.rand(MIXTURE.units(axis), dtype=torch.float64, generator=generator) for i in range(4)}
        for axis in ("experts", "expert_ffn", "shared_ffn")
    }
    plan = choose(scores_of(values, MIXTURE), experts=3, expert_ffn=2, shared_ffn=4, layers=(0, 2))
    assert plan.target == MIXTURE.resized(layers=2, experts=3, expert_ffn=2, shared_ffn=4)
    for layer in (0, 2):
        experts = sorted(best(values["experts"][layer].tolist(), 3))
        neurons = [
            6 * e + n for e in experts for n in sorted(best(values["expert_ffn"][layer].view(4, 6)[e].tolist(), 2))
        ]
        assert plan.keep["experts"][layer] == tuple(experts)
        assert plan.keep["expert_ffn"][layer] == tuple(neurons)
        assert len(plan.keep["shared_ffn"][layer]) == 4
    with pytest.raises(PlanError, match="axis experts should keep 1, but every token goes through 2"):
        choose(scores_of(values, MIXTURE), experts=1)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hiden": 3}, r"axis 'hiden' is not known\. Did you mean 'hidden'\? Known: hidden, ffn"),
        ({"hidden": 13}, r"axis hidden should keep 13 of 12\. Ask for 1 to 12"),
        ({"hidden": 0}, "axis hidden should keep 0 of 12"),
        ({"heads": 4}, r"heads should keep 4, which cannot be spread evenly over 3 kv_groups\. Keep a multiple of 3"),
        ({"ffn": 3}, r"axis ffn was not scored\. Score it first; scored so far: heads, hidden"),
        ({"kv_groups": 2, "heads": 9}, "axis heads should keep 9, which cannot be spread evenly over 2 kv_groups"),
        ({"kv_groups": 2, "heads": 12}, r"axis heads should keep 12, but 2 kv_groups hold 8\. Keep at most that many"),
        ({"experts": 2}, "axis experts should keep 2, but the model does not have this axis"),
        ({"layers": (0, 4)}, "axis layers keeps indices from 0 to 4"),
        ({"layers": (1, 0)}, "axis layers: kept indices must ascend"),
        ({"layers": ()}, "axis layers keeps nothing"),
        ({"layers": (), "heads": 6, "scope": "network"}, "axis layers keeps nothing"),
        (
            {"scope": "netwrk", "heads": 6},
            r"scope 'netwrk' is not known\. Did you mean 'network'\? Use layer or network",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused(sizes: dict, message: str) -> None:
    scores = random_scores()
    with pytest.raises(PlanError, match=message):
        choose(scores_of({axis: scores.values[axis] for axis in ("heads", "hidden")}), **sizes)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("axis", "cut"), [("hidden", "hidden"), ("ffn", "ffn"), ("heads", "heads"), ("heads", "kv_groups")]
)
def test_a_score_that_is_not_finite_ranks_nothing(axis: str, cut: str, value: float) -> None:
    scores = random_scores()
    list(scores.values[axis].values())[-1][3] = value
    with pytest.raises(PlanError, match=f"the scores of {cut}.* are not all finite"):
        choose(scores, **{cut: 6 if cut != "kv_groups" else 2})


def test_scores_of_another_shape_rank_nothing() -> None:
    values = {"hidden": {None: torch.ones(5, dtype=torch.float64)}}
    with pytest.raises(PlanError, match="the scores of hidden are not one for each of 12 units"):
        choose(scores_of(values), hidden=4)
