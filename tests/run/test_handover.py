"""A student can be exported from any training checkpoint, in both formats, at any layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from minitron_megatron.convert import folder_hash, model_hash, read_config
from minitron_megatron.errors import MinitronError, RecipeError
from minitron_megatron.files import read_json, write_json
from minitron_megatron.model import assign, build, named_shards
from minitron_megatron.parallel import Topology
from minitron_megatron.recipe import load_recipe
from minitron_megatron.run.handover import Format, hand_over
from minitron_megatron.testing import Pool
from tests.recipes import tiny_recipe
from tests.run.test_phases import phased, work

Write = Callable[..., Path]
KEYS = {"retain": True, "save_every": 2, "validate_every": 2, "keep_checkpoints": 3}
EXACT = "export.dtype=float32"


def hand(topology: Topology, recipe: Path, to: Path, checkpoint: str = "", form: Format = "hf") -> Path:
    return hand_over(load_recipe(recipe, [EXACT]), topology, to, checkpoint=checkpoint, form=form)


@pytest.fixture(scope="module")
def trained(material: Path, tmp_path_factory: pytest.TempPathFactory, pool: Pool) -> Path:
    """Recipe of a run with finished distillation and retained checkpoints; `losses.json` has the losses by step."""
    folder = tmp_path_factory.mktemp("trained")

    def write(**changes: Any) -> Path:
        keys = tiny_recipe(material) | {"out": str(folder / "run")} | changes
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in keys.items() if value is not None}))
        return path

    recipe = phased(write, **KEYS)
    said = pool.run(work, recipe, tp=2)[0]
    losses = {step: values["validation_loss"] for _, step, _, values in said if "validation_loss" in values}
    write_json(recipe.with_name("losses.json"), losses)
    return recipe


@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"pp": 2}, {"pp": 2, "vp": 2}])
def test_a_checkpoint_becomes_a_hugging_face_folder(trained: Path, pool: Pool, layout: dict, tmp_path: Path) -> None:
    """`newest` is the finished student, `best` has the lowest validation loss, and any step can be named."""
    out = load_recipe(trained).out
    path = pool.run(hand, trained, tmp_path / "newest", "newest", **layout)[0]
    assert path.name == "step_00000006"
    assert folder_hash(tmp_path / "newest") == folder_hash(out / "distilled")
    assert (tmp_path / "newest" / "tokenizer.json").is_file()
    losses = {int(step): loss for step, loss in read_json(trained.with_name("losses.json")).items()}
    best = pool.run(hand, trained, tmp_path / "best", "best", **layout)[0]
    assert int(best.name.removeprefix("step_")) == min(losses, key=lambda step: (losses[step], -step))
    earlier = pool.run(hand, trained, tmp_path / "four", "4", **layout)[0]
    assert earlier.name == "step_00000004"
    assert len({folder_hash(tmp_path / name) for name in ("newest", "four")} | {folder_hash(out / "pruned")}) == 3


def megatron_hash(topology: Topology, folder: Path, like: Path) -> tuple[str, str, dict]:
    """Return (tracker file, hash of the weights as loaded by mcore alone, arguments)."""
    from megatron.core import dist_checkpointing

    tracker = (folder / "latest_checkpointed_iteration.txt").read_text()
    path, model = str(folder / tracker), build(read_config(like), topology)
    for shard in named_shards(model):
        assign(shard, torch.full(shard.tensor.shape, torch.nan))
    sharded = {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(model)}
    sharded = sharded if len(model) > 1 else {"model": sharded["model0"]}
    loaded = dist_checkpointing.load(sharded, path)
    common = dist_checkpointing.load_common_state_dict(path)
    for number, chunk in enumerate(model):
        chunk.load_state_dict(loaded["model" if len(model) == 1 else f"model{number}"])
    return tracker, model_hash(model, topology), vars(common["args"]) | {"version": common["checkpoint_version"]}


@pytest.mark.parametrize(
    ("written", "read"), [({"tp": 2}, {"pp": 2}), ({}, {"tp": 2}), ({"pp": 2}, {"tp": 2, "pp": 2})]
)
def test_megatron_lm_loads_it(trained: Path, pool: Pool, written: dict, read: dict, tmp_path: Path) -> None:
    out = load_recipe(trained).out
    source = pool.run(hand, trained, tmp_path / "lm", "", "megatron", **written)[0]
    assert source == out / "distilled"
    shape = read_config(out / "distilled").shape
    for tracker, digest, arguments in pool.run(megatron_hash, tmp_path / "lm", out / "distilled", **read):
        assert (tracker, digest) == ("release", folder_hash(out / "distilled"))
        assert (arguments["num_layers"], arguments["hidden_size"]) == (shape.layers, shape.hidden)
        assert (arguments["num_query_groups"], arguments["kv_channels"]) == (shape.kv_groups, shape.head_dim)
        assert arguments["swiglu"] and arguments["padded_vocab_size"] == shape.padded_vocab
        assert arguments["version"] == 3.0
    assert not list(tmp_path.glob("*.partial"))


def test_what_cannot_be_handed_over_is_one_message(
    trained: Path, recipe_file: Write, pool: Pool, tmp_path: Path
) -> None:
    for to, checkpoint, says in (
        (tmp_path, "newest", "already exists"),
        (tmp_path / "new", "5", "no checkpoint 5. Use newest, best or one of 2, 4, 6"),
    ):
        with pytest.raises(RecipeError, match=says):
            pool.run(hand, trained, to, checkpoint)
    with pytest.raises(MinitronError, match="not done"):
        pool.run(hand, recipe_file(seed=9), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_student_begins_with_what_was_handed_over(trained: Path, pool: Pool, tmp_path: Path) -> None:
    """The first loss equals the checkpoint's last one; a folder of another shape is refused."""
    pool.run(hand, trained, tmp_path / "start", "newest")
    started, before = (
        pool.run(work, trained, ("distill.lr=1e-4", f"out={tmp_path / name}", *more))[0]
        for name, more in (("b", (f"distill.start={tmp_path / 'start'}",)), ("a", ()))
    )
    assert started[0][3]["loss"] < before[0][3]["loss"]
    record = read_json(tmp_path / "b" / "stages" / "distill.json")
    assert record["fingerprint"] != read_json(tmp_path / "a" / "stages" / "distill.json")["fingerprint"]
    with pytest.raises(
        RecipeError, match=r"distill\.start is .*, which does not have the student's shape: .*\. Give another f"
    ):
        pool.run(work, trained, (f"distill.start={load_recipe(trained).model}", f"out={tmp_path / 'c'}"))
