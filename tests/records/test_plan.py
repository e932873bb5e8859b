"""An invalid plan is refused on construction, and a file that does not hold a plan is refused on loading."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_megatron.errors import CheckpointError, PlanError
from minitron_megatron.layout import Shape
from minitron_megatron.records import Plan

SHAPE = Shape(layers=3, hidden=8, ffn=6, heads=4, kv_groups=2, head_dim=4, vocab=11)
FULL = {
    "keep": {"ffn": {0: (0, 5), 2: (1, 2)}, "heads": {0: (0, 3), 2: (1, 2)}, "hidden": {None: (0, 2, 7)}},
    "layers": (0, 2),
    "margins": {"ffn": {0: 0.25, 2: 1e-7}, "hidden": {None: 1 / 3}},
    "model_hash": "abc",
}


def EACH(kept: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    """Return the same kept indices for every layer."""
    return dict.fromkeys(range(3), kept)


MIXTURE = replace(SHAPE, ffn=0, experts=3, experts_per_token=2, expert_ffn=6)
CUT_GROUP = {"kv_groups": EACH((0,)), "heads": {0: (0,), 1: (2,), 2: (1,)}}


def test_groups_take_what_lies_in_them_along() -> None:
    plan = Plan(SHAPE, {"kv_groups": {0: (0,), 1: (1,), 2: (0,)}})
    assert (plan.target.kv_groups, plan.target.heads) == (1, 2)
    plan = Plan(SHAPE, {"kv_groups": {0: (0,), 1: (1,), 2: (0,)}, "heads": {0: (1,), 1: (2,), 2: (0,)}})
    assert (plan.target.kv_groups, plan.target.heads) == (1, 1)
    plan = Plan(MIXTURE, {"experts": EACH((0, 2)), "expert_ffn": EACH((0, 5, 12, 13))})
    assert (plan.target.experts, plan.target.expert_ffn) == (2, 2)
    assert Plan(MIXTURE, {"experts": EACH((0, 2))}).target == replace(MIXTURE, experts=2)


def test_a_plan_says_what_it_leaves() -> None:
    plan = Plan(SHAPE, **FULL)
    assert plan.kept_layers == (0, 2)
    assert plan.target == Shape(layers=2, hidden=3, ffn=2, heads=2, kv_groups=2, head_dim=4, vocab=11)
    assert Plan(SHAPE).target == SHAPE
    assert Plan(SHAPE).kept_layers == (0, 1, 2)


def test_a_layers_parameters_keep_its_own_units_and_the_shared_ones() -> None:
    plan = Plan(SHAPE, **FULL)
    inside, outside = plan.keep_at(2), plan.keep_at(None)
    assert {axis: kept.tolist() for axis, kept in inside.items()} == {
        "ffn": [1, 2],
        "heads": [1, 2],
        "hidden": [0, 2, 7],
    }
    assert {axis: kept.tolist() for axis, kept in outside.items()} == {"hidden": [0, 2, 7]}
    assert all(kept.dtype is torch.int64 for kept in inside.values())
    assert Plan(SHAPE).keep_at(1) == {}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"layers": ()}, r"axis layers keeps nothing of 3 units\. Keep at least one"),
        ({"layers": (2, 1)}, "axis layers: kept indices must ascend without repeats"),
        ({"layers": (1, 3)}, r"axis layers keeps indices from 1 to 3\. Valid ones run from 0 to 2"),
        ({"keep": {"hidden": {None: ()}}}, "axis hidden keeps nothing of 8"),
        ({"keep": {"hidden": {None: (3, 3)}}}, "axis hidden: kept indices must ascend without repeats"),
        ({"keep": {"hidden": {None: (4, 3)}}}, "axis hidden: kept indices must ascend without repeats"),
        ({"keep": {"hidden": {None: (0, 8)}}}, r"axis hidden keeps indices from 0 to 8\. Valid ones run from 0 to 7"),
        ({"keep": {"hidden": {None: (-1, 3)}}}, r"axis hidden keeps indices from -1 to 3\. Valid ones run from 0 to 7"),
        ({"keep": {"hidden": {0: (1,)}}}, r"indices for all layers together, and has them for layer 0\."),
        (
            {"keep": {"ffn": {0: (1,), 1: (1,)}}},
            r"axis ffn must have .* layer 1, layer 2, and has them for layer 0, layer 1\.",
        ),
        (
            {"keep": {"ffn": {0: (1,), 1: (1,)}}, "layers": (0, 2)},
            "layer 0, layer 2, and has them for layer 0, layer",
        ),
        ({"keep": {"ffn": {None: (1,)}}}, "has them for all layers together"),
        ({"keep": {"ffn": {0: (1,), 1: (1,), 2: (1, 2)}}}, r"axis ffn keeps different sizes in different layers"),
        ({"keep": {"heads": {i: (0, 1) for i in range(3)}}}, r"axis heads keeps 0 or 2 units in different kv_groups"),
        ({"keep": {"fnn": {None: (1,)}}}, r"axis 'fnn' is not known\. Did you mean 'ffn'\?"),
        ({"keep": {"vocab": {None: (1,)}}}, "axis 'vocab' is not known"),
        ({"keep": {"layers": {None: (1,)}}}, "axis 'layers' is not known"),
        ({"keep": CUT_GROUP}, r"axis heads keeps unit 2 of layer 1, but axis kv_groups removes"),
        ({"shape": MIXTURE, "keep": {"experts": EACH((0,))}}, "axis experts keeps 1, but every token is routed to 2"),
        (
            {"shape": MIXTURE, "keep": {"expert_ffn": EACH((0, 1, 2, 12))}},
            "keeps 0 or 1 or 3 units in different experts",
        ),
    ],
)
def test_what_does_not_fit_is_refused_when_made(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(PlanError, match=says):
        Plan(**{"shape": SHAPE, **wrong})


@pytest.mark.parametrize("content", [FULL, {}])
def test_a_plan_comes_back_as_it_was(tmp_path: Path, content: dict[str, Any]) -> None:
    plan = Plan(SHAPE, **content)
    plan.save(tmp_path / "plan.json")
    back = Plan.load(tmp_path / "plan.json")
    assert back == plan
    back.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()


def drop(key: str) -> Any:
    return lambda raw: {name: value for name, value in raw.items() if name != key}


@pytest.mark.parametrize(
    "change",
    [
        *(drop(key) for key in ("shape", "keep", "layers", "margins", "model_hash")),
        lambda raw: [],
        lambda raw: {**raw, "keep": []},
        lambda raw: {**raw, "keep": {"ffn": {"first": [1]}}},
        lambda raw: {**raw, "shape": {"layers": 1}},
        lambda raw: {**raw, "shape": {**raw["shape"], "kv_groups": 0}},
        lambda raw: {**raw, "keep": {"hidden": {"null": ["1"]}}},
        lambda raw: {**raw, "keep": {"hidden": {"null": 1}}},
        lambda raw: {**raw, "layers": [True]},
        lambda raw: {**raw, "margins": {"hidden": {"null": "wide"}}},
    ],
)
def test_a_foreign_file_holds_no_plan(tmp_path: Path, change: Any) -> None:
    path = tmp_path / "plan.json"
    Plan(SHAPE, **FULL).save(path)
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(CheckpointError, match=rf"^{path} holds no plan \(.+\)\. Prune the model again\.$"):
        Plan.load(path)


def test_a_layer_that_is_no_number_is_named(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    Plan(SHAPE, **FULL).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"keep": {"ffn": {"first": [1]}}}))
    with pytest.raises(CheckpointError) as caught:
        Plan.load(path)
    assert str(caught.value) == f"{path} holds no plan ('first' is not the number of a layer). Prune the model again."


def test_a_missing_or_torn_file_holds_no_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(CheckpointError, match="holds no plan"):
        Plan.load(path)
    Plan(SHAPE, **FULL).save(path)
    whole = path.read_text()
    for length in (0, 50, len(whole) - 3):
        path.write_text(whole[:length])
        with pytest.raises(CheckpointError, match="holds no plan"):
            Plan.load(path)


def test_a_file_with_an_impossible_plan_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    Plan(SHAPE, **FULL).save(path)
    path.write_text(path.read_text().replace('"hidden": 8', '"hidden": 7'))
    with pytest.raises(
        PlanError,
        match=rf"^{path}: axis hidden keeps indices from 0 to 7\. Valid ones run from 0 to 6\. Prune the model",
    ):
        Plan.load(path)
