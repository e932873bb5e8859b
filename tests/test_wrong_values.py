"""Messages about values of a wrong type: what is there, where, and what should be; never pydantic's own words."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest
from typing_extensions import TypedDict

from minitron_megatron.errors import FileError, MinitronError, RecipeError, expect_number
from minitron_megatron.files import check_as
from minitron_megatron.parallel import Parallel, Topology
from tests.tiny import SHAPE


@dataclass(frozen=True)
class Inner:
    size: int


class Record(TypedDict, total=False):
    inner: Inner
    rows: list[tuple[int, float]]
    name: str
    ends: list[int] | int | None
    kind: Literal["ffn", "heads"]
    found: bool


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([], "it is a list, and should be a block of keys"),
        ({"inner": None}, "inner is null, and should be a block of keys"),
        ({"inner": {}}, "inner.size is missing"),
        ({"inner": {"size": "x" * 200}}, f"inner.size is '{'x' * 96}..., and should be a whole number"),
        ({"inner": {"size": 1.5}}, "inner.size is 1.5, and should be a whole number"),
        ({"rows": [[1, 2.0], [3, "a"]]}, "rows.1.1 is 'a', and should be a number"),
        ({"rows": [[1]]}, "rows.0.1 is missing"),
        ({"rows": {}}, "rows is an object, and should be a list"),
        ({"name": 5}, "name is 5, and should be text"),
        ({"ends": "x"}, "ends is 'x', and should be a list or a whole number"),
        ({"kind": "fnn"}, "kind is 'fnn', and should be 'ffn' or 'heads'"),
        ({"found": 1, "name": True}, "name is true, and should be text (the first of 2 wrong places)"),
        ({"found": 1, "name": True, "kind": 1}, "name is true, and should be text (the first of 3 wrong places)"),
    ],
)
def test_a_record_says_what_is_there_and_what_should_be(value: Any, says: str) -> None:
    with pytest.raises(FileError) as caught:
        check_as(value, Record, "run/plan.json")
    assert str(caught.value) == f"run/plan.json does not hold what it should: {says}."


def test_settings_speak_alike() -> None:
    with pytest.raises(RecipeError) as caught:
        Parallel(tp="x", pp=[2])
    assert str(caught.value) == "tp is 'x': give a whole number. (1 more error.)"
    with pytest.raises(RecipeError, match=r"^mfu is 2\. It must be a finite number above 0 and of at most 1\.$"):
        expect_number("mfu", 2, above=0, at_most=1)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: replace(SHAPE, ffn="x"), "ffn of a shape is 'x'. It must be a whole number."),
        (lambda: replace(SHAPE, tied=1), "tied of a shape is 1. It must be true or false."),
        (lambda: Topology(pp=2).stages(1), "1 layer cannot fill 2 pipeline stages (pp=2 x vp=1). Use at most 1 stage."),
    ],
)
def test_numbers_and_nouns_agree(make: Any, says: str) -> None:
    with pytest.raises(MinitronError, match=f"^{re.escape(says)}$"):
        make()


def test_shapes_are_told_apart_by_the_sizes_that_differ() -> None:
    assert replace(SHAPE, hidden=32, layers=4).differences(SHAPE) == "layers 4 instead of 5, hidden 32 instead of 48"
    assert not SHAPE.differences(SHAPE)
