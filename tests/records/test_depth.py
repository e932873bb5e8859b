"""Depth scores are plain data: saved scores load unchanged, and any other file is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minitron_megatron.errors import CheckpointError
from minitron_megatron.layout import Shape
from minitron_megatron.records import DepthScores

SHAPE = Shape(layers=12, hidden=8, ffn=6, heads=4, kv_groups=2, head_dim=2, vocab=11)
BLOCKS = {(first, length): 1 / (3 + first + length) for length in (4, 1) for first in range(12 - length, -1, -1)}
DEPTH = DepthScores(SHAPE, "loss", True, 0.1, BLOCKS, ((3, 2.5), (11, 1 / 3)), 12, 100, "abc")


def test_depth_scores_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "scores" / "depth.json"
    DEPTH.save(path)
    assert DepthScores.load(path) == DEPTH
    replace(DEPTH, metric="winogrande", lower_is_better=False, greedy=()).save(path)
    assert DepthScores.load(path) == replace(DEPTH, metric="winogrande", lower_is_better=False, greedy=())


def test_the_same_scores_are_the_same_bytes(tmp_path: Path) -> None:
    DEPTH.save(tmp_path / "a")
    replace(DEPTH, blocks=dict(reversed(BLOCKS.items()))).save(tmp_path / "b")
    DepthScores.load(tmp_path / "a").save(tmp_path / "c")
    first = (tmp_path / "a").read_bytes()
    assert first == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()


def test_blocks_by_length() -> None:
    assert DEPTH.lengths == (1, 4)
    assert list(DEPTH.of_length(4).items()) == [(first, 1 / (7 + first)) for first in range(9)]
    assert DEPTH.of_length(2) == {}


WHOLE: dict[str, Any] = {
    "shape": vars(SHAPE),
    "metric": "loss",
    "lower_is_better": True,
    "baseline": 0.1,
    "blocks": [[0, 1, 2.0]],
    "greedy": [[0, 2.0]],
    "samples": 1,
    "tokens": 1,
    "model_hash": "",
}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1, null]",
        "null",
        json.dumps({key: value for key, value in WHOLE.items() if key != "metric"}),
        json.dumps({key: value for key, value in WHOLE.items() if key != "blocks"}),
        json.dumps(WHOLE | {"shape": {"layers": 2}}),
        json.dumps(WHOLE | {"shape": [2]}),
        json.dumps(WHOLE | {"blocks": [[0, 1]]}),
        json.dumps(WHOLE | {"blocks": {"0": 1.0}}),
        json.dumps(WHOLE | {"blocks": [[0, 1, None]]}),
        json.dumps(WHOLE | {"blocks": [[0, 1, float("nan")]]}),
        json.dumps(WHOLE | {"blocks": [[7, 99, 1.0]]}),
        json.dumps(WHOLE | {"greedy": [[99, 1.0]]}),
        json.dumps(WHOLE | {"baseline": "1"}),
        json.dumps(WHOLE | {"greedy": [3, 4]}),
        json.dumps(WHOLE | {"colour": "green"}),
    ],
)
def test_a_torn_or_foreign_file_holds_no_depth_scores(tmp_path: Path, content: str) -> None:
    path = tmp_path / "depth.json"
    path.write_text(json.dumps(WHOLE))
    assert DepthScores.load(path).blocks == {(0, 1): 2.0}
    path.write_text(content)
    with pytest.raises(CheckpointError, match=r"holds no depth scores .* Score the model again"):
        DepthScores.load(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"blocks": [[7, 99, 1.0]]}, "a block lies outside of the model's 12 layers"),
        ({"greedy": [[99, 1.0]]}, "greedy names a layer outside of the model's 12 layers"),
    ],
)
def test_layers_that_the_model_does_not_have_are_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "depth.json"
    path.write_text(json.dumps(WHOLE | change))
    with pytest.raises(CheckpointError) as caught:
        DepthScores.load(path)
    assert str(caught.value) == f"{path} holds no depth scores ({path}: {said}). Score the model again."


def test_a_missing_file_holds_no_depth_scores(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no depth scores"):
        DepthScores.load(tmp_path / "depth.json")


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "depth.json"
    DEPTH.save(path)
    with pytest.raises(TypeError):
        replace(DEPTH, blocks={(0, 1): {1.0}}).save(path)  # type: ignore[dict-item]
    assert DepthScores.load(path) == DEPTH
    assert [file.name for file in tmp_path.iterdir()] == ["depth.json"]
