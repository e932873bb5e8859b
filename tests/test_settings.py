"""Values of settings that are refused by any block: paths, booleans, and too many values."""

from __future__ import annotations

from pathlib import Path

import pytest

from minitron_megatron.errors import RecipeError
from minitron_megatron.settings import Count, FilePath, Settings


class Block(Settings):
    path: FilePath = Path("a")
    count: Count = 1
    switch: bool = False


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"path": 3}, "path is 3: give a path."),
        ({"path": " "}, "path is ' ': give a path; this one is empty or contains a NUL character."),
        ({"path": "a\0"}, "path is 'a\\x00': give a path; this one is empty or contains a NUL character."),
        ({"path": "\ud83d"}, "path is '\\ud83d': give a path whose name is UTF-8."),
        ({"path": "x" * 300}, "give a path of at most 4096 bytes, with each name at most 255 bytes."),
        ({"switch": 1}, "switch is 1: give true or false."),
        ({"switch": None}, "switch is null: give true or false."),
        ({"count": True}, "count is true: give a value of another type; this key is not a true/false switch."),
        ({"cuont": 3}, "cuont is not a known key. Did you mean 'count'?"),
    ],
)
def test_a_wrong_value_says_what_to_give(values: dict[str, object], said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Block(**values)  # type: ignore[arg-type]
    assert str(caught.value).endswith(said)


def test_values_by_position_are_as_many_as_fields() -> None:
    assert Block("b", 2).count == 2  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^Block has 3 fields, and 4 values were given$"):
        Block("b", 2, True, 4)  # type: ignore[arg-type, call-arg]
