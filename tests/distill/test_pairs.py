"""Pairs of states: written as in the papers; refused if a layer does not exist or the pair spans two stages."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from minitron_megatron.distill import StatePairs
from minitron_megatron.errors import RecipeError
from minitron_megatron.parallel import Topology
from tests.tiny import SHAPE

TEACHER, STUDENT = replace(SHAPE, layers=32), replace(SHAPE, layers=16)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"outputs": ("29-13",)}, r"outputs has '29-13', which is not a pair of layers\. Write teacher:student"),
        ({"attention": ("29:",)}, "attention has '29:', which is not a pair"),
        ({"mlp_inputs": ("-1:3",)}, "mlp_inputs has '-1:3', which is not a pair"),
        ({"outputs": (1753,)}, r"outputs has '1753', which is not a pair"),
        ({"embedding": True, "loss": "cosin"}, r"'cosin' is not known\. Did you mean 'cosine'\? Known: cosine, mse\."),
        (
            {"embedding": True, "alpha": "dynamical"},
            r"alpha is 'dynamical': give a number above 0, or dyn",
        ),
        ({"embedding": True, "alpha": 0.0}, r"alpha is 0\.0: give a number above 0"),
        ({}, r"no states to match are given\. Set at least one of embedding, outputs, mlp_inputs, attention\."),
    ],
)
def test_what_is_no_mapping_is_refused(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        StatePairs(**keys)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (
            {"outputs": ("32:13",)},
            r"outputs 32:13: the teacher has no layer 32, only 32 layers\. Give a layer from 0 to 31\.",
        ),
        (
            {"mlp_inputs": ("1:16",)},
            r"mlp_inputs 1:16: the student has no layer 16, only 16 layers\. Give a layer from 0 to",
        ),
    ],
)
def test_a_layer_that_is_not_there_is_named(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        StatePairs(**keys).check(TEACHER, STUDENT, Topology())


def test_relations_between_tokens_want_whole_sequences() -> None:
    StatePairs(outputs=("29:13",)).check(TEACHER, STUDENT, Topology(cp=2))
    with pytest.raises(RecipeError, match=r"on each rank, but cp=2 splits them\. Set cp to 1"):
        StatePairs(outputs=("29:13",), attention=("29:13",)).check(TEACHER, STUDENT, Topology(cp=2))


@pytest.mark.parametrize("topology", [Topology(), Topology(tp=2, pp=2), Topology(pp=4), Topology(pp=2, vp=2)])
def test_the_papers_mapping_lies_on_one_stage(topology: Topology) -> None:
    StatePairs(embedding=True, outputs=("29:13",), mlp_inputs=("29:13",)).check(TEACHER, STUDENT, topology)


@pytest.mark.parametrize(
    ("kind", "pair", "topology", "says"),
    [
        ("outputs", "29:6", Topology(pp=2), r"stage 1 and the student's on 0 \(pp=2, vp=1\)\. Use 29:7, or"),
        ("outputs", "14:7", Topology(pp=2), r"teacher's state is on pipeline stage 0 and .* on 1 .*Use 14:6, or"),
        ("mlp_inputs", "15:8", Topology(pp=2), r"teacher's state is on pipeline stage 0 and .* on 1 .*Use 15:7, or"),
        ("attention", "9:0", Topology(pp=2, vp=2), r"pipeline stage 1 and the student's on 0 .*vp=2\)\. Use 7:0, or"),
    ],
)
def test_a_pair_over_two_stages_is_told_of_a_near_one(kind: str, pair: str, topology: Topology, says: str) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        StatePairs(**{kind: (pair,)}).check(TEACHER, STUDENT, topology)
    instead = str(caught.value).split("Use ")[1].split(",")[0]
    StatePairs(**{kind: (instead,)}).check(TEACHER, STUDENT, topology)
