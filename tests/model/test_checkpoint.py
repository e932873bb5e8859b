"""Checkpoints are whole or absent, few, and run nobody's code."""

from __future__ import annotations

import io
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_megatron.errors import CheckpointError
from minitron_megatron.layout import Shape
from minitron_megatron.model import (
    ModelConfig,
    build,
    fill_initial,
    latest_checkpoint,
    load_checkpoint,
    named_shards,
    save_checkpoint,
)
from minitron_megatron.parallel import Topology, mend_distributed_optimizer
from minitron_megatron.testing import Pool

SHAPE = Shape(layers=2, hidden=16, ffn=16, heads=2, kv_groups=2, head_dim=8, vocab=100)


def trainee(topology: Topology, seed: int) -> tuple[list[Any], Any]:
    """The DDP-wrapped chunks of a small model and their distributed optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    mend_distributed_optimizer()
    chunks = build(ModelConfig(SHAPE), topology)
    fill_initial(chunks, topology, seed)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
    wrapped = [DistributedDataParallel(chunk.config, ddp, chunk) for chunk in chunks]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=0.01, use_distributed_optimizer=True), wrapped
    )
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        part._init_optimizer_states_with_dummy_values()
    return wrapped, optimizer


def weights(chunks: list[Any]) -> dict[str, Tensor]:
    return {shard.name: shard.tensor.detach().clone() for shard in named_shards([each.module for each in chunks])}


def save(topology: Topology, folder: Path, steps: list[int], seed: int = 1) -> dict[str, Tensor]:
    chunks, optimizer = trainee(topology, seed)
    for step in steps:
        save_checkpoint(folder, step, chunks, optimizer, {"note": f"after {step}"}, topology)
    return weights(chunks)


def load(topology: Topology, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    chunks, optimizer = trainee(topology, seed=2)
    state = load_checkpoint(path, chunks, optimizer)
    return state, weights(chunks)


@pytest.fixture(scope="module")
def saved(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """A whole checkpoint of one process, and the weights in it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    [held] = pool.run(save, folder, [1])
    return folder / "step_00000001", held


@pytest.fixture
def copy(saved: tuple[Path, dict[str, Tensor]], tmp_path: Path) -> Path:
    """A copy of it to spoil."""
    return Path(shutil.copytree(saved[0], tmp_path / "step_00000001"))


def test_what_is_loaded_is_what_was_saved(pool: Pool, saved: tuple[Path, dict[str, Tensor]]) -> None:
    path, held = saved
    [(state, loaded)] = pool.run(load, path)
    assert state == {"note": "after 1", "step": 1}
    assert loaded.keys() == held.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in held.items())


def test_only_the_newest_two_are_kept(pool: Pool, tmp_path: Path) -> None:
    pool.run(save, tmp_path, [8, 9, 10], dp=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000009", "step_00000010"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step_00000010"


def test_what_is_not_whole_is_never_taken(copy: Path) -> None:
    folder = copy.parent
    shutil.copytree(copy, folder / "step_00000002.partial")
    shutil.copytree(copy, folder / "step_00000003", ignore=shutil.ignore_patterns("state.json"))
    assert latest_checkpoint(folder) == copy
    assert latest_checkpoint(folder / "nowhere") is None


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("pattern", "spoil"),
    [
        (".metadata", Path.unlink),
        (".metadata", truncated),
        ("__0_0.distcp", Path.unlink),
        ("__0_0.distcp", truncated),
        ("common.pt", Path.unlink),
        ("common.pt", truncated),
        ("metadata.json", truncated),
        ("state.json", truncated),
    ],
)
def test_a_torn_checkpoint_is_an_error_that_names_it(
    pool: Pool, copy: Path, pattern: str, spoil: Callable[[Path], None]
) -> None:
    [file] = copy.glob(pattern)
    spoil(file)
    with pytest.raises(CheckpointError, match=str(copy)):
        pool.run(load, copy)


@pytest.mark.parametrize("stop", range(0, 100, 7))
def test_an_index_cut_anywhere_is_torn(pool: Pool, copy: Path, stop: int) -> None:
    from minitron_megatron.model.checkpoint import check_metadata

    index = copy / ".metadata"
    check_metadata(index)
    whole = index.read_bytes()
    index.write_bytes(whole[: len(whole) * stop // 100])
    with pytest.raises(CheckpointError, match=r"is torn or not safe to open"):
        check_metadata(index)


# ---- hostile pickles


class Payload:
    """Its pickle creates a file when it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.marker), "w")


def test_a_hostile_index_is_refused_and_does_not_run(pool: Pool, copy: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    hostile = pickle.dumps(Payload(marker))
    pickle.loads(hostile).close()
    assert marker.exists(), "the payload works where nothing stops it"
    marker.unlink()
    (copy / ".metadata").write_bytes(hostile)
    with pytest.raises(CheckpointError, match=r"not safe to open: it asks for (io|_io)\.open"):
        pool.run(load, copy)
    assert not marker.exists()


@pytest.mark.parametrize("hidden_in", ["a tensor's place", "an object's place"])
def test_a_hostile_object_among_the_weights_does_not_run(
    pool: Pool, copy: Path, tmp_path: Path, hidden_in: str
) -> None:
    """torch unpickles freely whatever the index calls bytes: the index must not be able to call anything so."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

    marker, body = tmp_path / "ran", io.BytesIO()
    torch.save(Payload(marker), body)
    (copy / "hostile.distcp").write_bytes(body.getvalue())
    index: Metadata = pickle.loads((copy / ".metadata").read_bytes())
    if hidden_in == "a tensor's place":
        name = "decoder.final_layernorm.weight"
    else:
        name = "decoder.layers.mlp.linear_fc2._extra_state/shard_0_2"
    index.state_dict_metadata[name] = BytesStorageMetadata()
    index.storage_data = {key: at for key, at in index.storage_data.items() if key.fqn != name}
    index.storage_data[MetadataIndex(name)] = _StorageInfo("hostile.distcp", 0, len(body.getvalue()))
    (copy / ".metadata").write_bytes(pickle.dumps(index))
    with pytest.raises(CheckpointError):
        pool.run(load, copy)
    assert not marker.exists()


def test_a_hostile_common_file_does_not_run(pool: Pool, copy: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"optimizer": Payload(marker)}, copy / "common.pt")
    with pytest.raises(CheckpointError, match=str(copy)):
        pool.run(load, copy)
    assert not marker.exists()
