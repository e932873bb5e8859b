"""Equal scores give equal files, and any other file is refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from minitron_megatron.errors import CheckpointError, RecipeError
from minitron_megatron.layout import Shape
from minitron_megatron.records import Scores, Statistic

SHAPE = Shape(layers=12, hidden=8, ffn=6, heads=4, kv_groups=2, head_dim=4, vocab=11)


def some_scores(seed: int = 0) -> Scores:
    generator = torch.Generator().manual_seed(seed)

    def units(size: int) -> torch.Tensor:
        return torch.rand(size, dtype=torch.float64, generator=generator)

    values = {
        "ffn": {layer: units(6) for layer in range(12)},
        "heads": {layer: units(4) for layer in range(12)},
        "hidden": {None: units(8)},
    }
    return Scores(
        values, SHAPE, Statistic("mean", "var", "pre", "norm_first"), samples=12, tokens=100, model_hash="abc"
    )


@pytest.mark.parametrize("place", ["batch", "sequence"])
def test_an_unknown_statistic_names_the_nearest(place: str) -> None:
    with pytest.raises(RecipeError, match=r"'meen' is not known\. Did you mean 'mean'\? Known: l2, mean, var"):
        Statistic(**{place: "meen"})


def test_the_papers_choice_is_the_default() -> None:
    assert Statistic() == Statistic(batch="l2", sequence="mean", neurons="post", heads="norm_last")


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ({"neurons": "past"}, r"neurons is 'past': should be 'post' or 'pre'\. Did you mean 'post'\?"),
        ({"heads": "norm"}, r"heads is 'norm': should be 'norm_last' or 'norm_first'\. Did you mean 'norm_"),
    ],
)
def test_an_unknown_place_or_order_names_the_nearest(place: dict[str, str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Statistic(**place)


def test_scores_come_back_as_they_were(tmp_path: Path) -> None:
    scores = some_scores()
    scores.save(tmp_path / "scores.safetensors")
    back = Scores.load(tmp_path / "scores.safetensors")
    assert replace(back, values={}) == replace(scores, values={})
    assert {axis: list(layers) for axis, layers in back.values.items()} == {
        "ffn": list(range(12)),  # sorted by number, not as text
        "heads": list(range(12)),
        "hidden": [None],
    }
    for axis, layers in scores.values.items():
        for layer, units in layers.items():
            torch.testing.assert_close(back.values[axis][layer], units, rtol=0, atol=0)
            assert back.values[axis][layer].dtype is torch.float64


def test_the_same_scores_are_the_same_bytes(tmp_path: Path) -> None:
    scores = some_scores()
    shuffled = {axis: dict(reversed(layers.items())) for axis, layers in reversed(scores.values.items())}
    scores.save(tmp_path / "a")
    replace(scores, values=shuffled).save(tmp_path / "b")
    Scores.load(tmp_path / "a").save(tmp_path / "c")
    some_scores(1).save(tmp_path / "other")
    first = (tmp_path / "a").read_bytes()
    assert first == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    assert first != (tmp_path / "other").read_bytes()


def test_scores_of_a_plugin_are_read_without_it(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    save_file(UNITS, str(path), metadata(statistic=Statistic().model_dump() | {"batch": "rms"}))
    scores = Scores.load(path)
    assert (scores.statistic.batch, scores.statistic.sequence) == ("rms", "mean")
    scores.save(tmp_path / "again.safetensors")
    assert Scores.load(tmp_path / "again.safetensors").statistic == scores.statistic


def metadata(**changes: object) -> dict[str, str]:
    about = {"shape": asdict(SHAPE), "statistic": Statistic().model_dump(), "samples": 1, "tokens": 1, "model_hash": ""}
    about |= changes
    return {"scores": json.dumps({key: value for key, value in about.items() if value is not None})}


UNITS = {"ffn.0": torch.ones(6)}


@pytest.mark.parametrize(
    ("tensors", "about"),
    [
        (UNITS, None),  # a file of weights
        (UNITS, {"scores": "{"}),
        (UNITS, metadata(samples=None)),
        (UNITS, metadata(shape={"layers": 1})),
        (UNITS, metadata(shape=[1])),
        (UNITS, metadata(statistic={"batch": "median"})),
        ({"ffn.first": torch.ones(6)}, metadata()),
        ({"ffn.12": torch.ones(6)}, metadata()),
        ({"ffn": torch.ones(6)}, metadata()),
        ({"fnf.0": torch.ones(6)}, metadata()),
        ({"ffn.0": torch.ones(6, 1)}, metadata()),
        ({"ffn.0": torch.full((6,), torch.nan)}, metadata()),
        ({"ffn.0": torch.tensor([1.0, torch.inf, 1, 1, 1, 1])}, metadata()),
        (UNITS, metadata(shape=asdict(SHAPE) | {"kv_groups": 0})),
        (UNITS, metadata(shape=asdict(SHAPE) | {"hidden": "8"})),
        (UNITS, metadata(tokens="many")),
    ],
)
def test_a_foreign_file_holds_no_scores(tmp_path: Path, tensors: dict, about: dict | None) -> None:
    path = tmp_path / "scores.safetensors"
    save_file(tensors, str(path), about)
    with pytest.raises(CheckpointError, match=rf"^{path} holds no scores \(.+\)\. Score the model again\.$"):
        Scores.load(path)


def test_a_missing_or_torn_file_holds_no_scores(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    with pytest.raises(CheckpointError, match="holds no scores"):
        Scores.load(path)
    some_scores().save(path)
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="holds no scores"):
            Scores.load(path)
