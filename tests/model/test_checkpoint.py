"""Checkpoints are whole or absent, superseded ones are removed, and no code in them runs."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import re
import select
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_megatron.errors import CheckpointError
from minitron_megatron.files import MANIFEST, write_checksums
from minitron_megatron.layout import Shape
from minitron_megatron.model import (
    Checkpoints,
    ModelConfig,
    Trainee,
    build,
    fill_initial,
    load_checkpoint,
    named_shards,
)
from minitron_megatron.model.writing import cause_of
from minitron_megatron.parallel import Topology, mend_distributed_optimizer
from minitron_megatron.testing import Pool
from tests.limits import HANGS

SHAPE = Shape(layers=2, hidden=16, ffn=16, heads=2, kv_groups=2, head_dim=8, vocab=100)


def trainee(topology: Topology, seed: int, name: str = "") -> Trainee:
    """Return the DDP-wrapped chunks of a small model and their distributed optimizer."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    mend_distributed_optimizer()
    chunks = build(ModelConfig(SHAPE), topology)
    fill_initial(chunks, topology, seed)
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=True)
    wrapped = [DistributedDataParallel(chunk.config, ddp, chunk) for chunk in chunks]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=0.01, weight_decay=0.0, use_distributed_optimizer=True), wrapped
    )
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        part._init_optimizer_states_with_dummy_values()
    return Trainee(wrapped, optimizer, name)


def weights(of: Trainee) -> dict[str, Tensor]:
    return {shard.name: shard.tensor.detach().clone() for shard in named_shards([each.module for each in of.chunks])}


def save(
    topology: Topology,
    folder: Path,
    steps: list[int],
    names: Sequence[str] = ("",),
    scores: Mapping[int, float] | None = None,
    asynchronous: bool = False,
) -> list[dict[str, Tensor]]:
    """Save models with different weights, which change right after the last save."""
    trainees = [trainee(topology, seed, name) for seed, name in enumerate(names, 1)]
    held = [weights(each) for each in trainees]
    store = Checkpoints(folder, topology, asynchronous=asynchronous)
    for step in steps:
        store.save(step, trainees, {"note": f"after {step}"}, score=(scores or {}).get(step))
    with torch.no_grad():
        for each in trainees:
            for chunk in each.chunks:
                [parameter.zero_() for parameter in chunk.parameters()]
    store.poll(wait=True)
    return held


def load(
    topology: Topology, path: Path, names: Sequence[str] = ("",)
) -> tuple[dict[str, Any], list[dict[str, Tensor]]]:
    trainees = [trainee(topology, 9, name) for name in names]
    state = load_checkpoint(path, trainees)
    return state, [weights(each) for each in trainees]


@pytest.fixture(scope="module")
def saved(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Complete checkpoint of one process."""
    folder = tmp_path_factory.mktemp("checkpoints")
    pool.run(save, folder, [1])
    return folder / "step_00000001"


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """Copy of `saved` that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "step_00000001"))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"dp": 2}], ids=["tp1", "tp2", "dp2"])
def test_what_is_loaded_is_what_was_saved(pool: Pool, tmp_path: Path, layout: dict, asynchronous: bool) -> None:
    """Both models of a run load as they were when saved, although they changed while they were written."""
    names = ("", "teacher")
    held = pool.run(save, tmp_path, [1], names, {}, asynchronous, **layout)
    for mine, (state, loaded) in zip(held, pool.run(load, tmp_path / "step_00000001", names, **layout), strict=True):
        assert state == {"note": "after 1", "step": 1, "score": None}
        for before, after in zip(mine, loaded, strict=True):
            assert before.keys() == after.keys()
            assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert not all(torch.equal(tensor, mine[1][name]) for name, tensor in mine[0].items())


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    ("scores", "stay"),
    [
        ({}, [9, 10]),
        ({7: 1.0, 8: 0.5, 9: 0.7}, [8, 9, 10]),
        ({7: 0.5, 10: 0.5}, [9, 10]),
        ({7: 0.5, 8: math.nan, 9: -math.inf}, [7, 9, 10]),
    ],
)
def test_the_newest_two_and_the_best_stay(
    pool: Pool, tmp_path: Path, scores: dict[int, float], stay: list[int], asynchronous: bool
) -> None:
    pool.run(save, tmp_path, [7, 8, 9, 10], ("",), scores, asynchronous)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step_{step:08}" for step in stay]


def newest_first(topology: Topology, folder: Path) -> list[Path]:
    return Checkpoints(folder, topology).newest_first()


def test_what_is_not_whole_is_never_taken(pool: Pool, copy: Path) -> None:
    folder = copy.parent
    shutil.copytree(copy, folder / "step_00000002.0123abcd.partial")
    shutil.copytree(copy, folder / "step_00000002.old")
    shutil.copytree(copy, folder / "step_00000003", ignore=shutil.ignore_patterns("state.json"))
    assert pool.run(newest_first, folder) == [[copy]]
    assert pool.run(newest_first, folder / "nowhere") == [[]]


def test_what_a_killed_writer_left_goes_with_the_next_checkpoint(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "step_00000001.0123abcd.partial" / "teacher").mkdir(parents=True)
    pool.run(save, tmp_path, [2])
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]


def test_a_step_that_is_saved_again_replaces_the_first(pool: Pool, copy: Path) -> None:
    folder = copy.parent
    (copy / "mine").touch()
    pool.run(save, folder, [int(copy.name.removeprefix("step_"))])
    assert [path.name for path in folder.iterdir()] == [copy.name] and not (copy / "mine").exists()


def save_where_it_is_full(topology: Topology, folder: Path, asynchronous: bool) -> list[str]:
    """Save step 1, then step 2 with all writes failing; return the message, and the checkpoints that exist then."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    model, write = trainee(topology, 1), filesystem_async._write_item
    store = Checkpoints(folder, topology, asynchronous=asynchronous)
    store.save(1, [model], {}, wait=True)
    filesystem_async._write_item = full
    try:
        store.save(2, [model], {}, wait=True)
    except CheckpointError as error:
        return [str(error), *(path.name for path in store.newest_first())]
    finally:
        filesystem_async._write_item = write
    return []


def give_up_amid_a_write(topology: Topology, folder: Path) -> list[bytes]:
    """Abandon a checkpoint whose writers never end; return a byte while one runs, then none once all have ended."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    reads, writes = os.pipe()

    def never_ends(*_: Any, **__: Any) -> None:
        os.write(writes, b"1")
        time.sleep(2 * HANGS)

    write = filesystem_async._write_item
    store = Checkpoints(folder, topology, asynchronous=True)
    filesystem_async._write_item = never_ends
    try:
        store.save(1, [trainee(topology, 1)], {})
    finally:
        filesystem_async._write_item = write
    os.close(writes)
    begun = os.read(reads, 1)
    store.close()
    gone = os.read(reads, 1) if select.select([reads], [], [], HANGS / 10)[0] else b"still there"
    return [begun, gone, *(path.suffix.encode() for path in folder.iterdir())]


def test_no_process_stays_of_a_write_that_is_given_up(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(give_up_amid_a_write, tmp_path) == [[b"1", b"", b".partial"]]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_full_disk_is_one_message_and_the_last_one_stays(pool: Pool, tmp_path: Path, asynchronous: bool) -> None:
    for message, *existing in pool.run(save_where_it_is_full, tmp_path, asynchronous, dp=2):
        assert "cannot be written" in message and "No space left on device" in message and "Traceback" not in message
        assert existing == ["step_00000001"]


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
    with pytest.raises(CheckpointError) as caught:
        pool.run(load, copy)
    text = str(caught.value)
    assert text.startswith(
        (f"checkpoint {copy} is not whole: {file} ", f"checkpoint index {file} is damaged or", f"{file} is")
    )
    assert text.count(". ") == 0, text


@pytest.mark.parametrize("pattern", [".metadata", "__0_0.distcp", "__0_*.distcp", "common.pt", "state.json"])
def test_a_flipped_bit_is_an_error_that_names_the_file(pool: Pool, copy: Path, pattern: str) -> None:
    *_, file = sorted(copy.glob(pattern))  # mcore 0.16 writes two files a rank here, 0.19 one
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(str(file))) as caught:
        pool.run(load, copy, dp=2)
    if pattern.endswith(".distcp"):  # nothing else reads them before their checksums
        assert str(caught.value) == (
            f"checkpoint {copy} is not whole: {file} has changed since it was written: {MANIFEST} has another checksum."
        )


def changed(path: Path, change: Callable[[Any], Any]) -> None:
    """Rewrite a JSON file, and update the list of checksums."""
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    others = (file for file in path.parent.iterdir() if file.name != MANIFEST)
    write_checksums(path.parent / MANIFEST, others)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("state.json", lambda state: []),
        ("state.json", lambda state: state | {"step": "1"}),
        ("state.json", lambda state: state | {"score": "best"}),
        ("metadata.json", lambda about: []),
        ("metadata.json", lambda about: about | {"sharded_backend": "zarr"}),
        ("metadata.json", lambda about: about | {"more": 1} if about.pop("sharded_backend_version") else about),
        ("checksums.json", lambda known: {}),
        ("checksums.json", lambda known: known | {"../../x": "0" * 64}),
    ],
)
def test_a_foreign_file_is_one_error_that_names_it(pool: Pool, copy: Path, name: str, change: Any) -> None:
    changed(copy / name, change) if name != MANIFEST else (copy / name).write_text(
        json.dumps(change(json.loads((copy / name).read_text())) or None)
    )
    with pytest.raises(CheckpointError, match=re.escape(str(copy / name))):
        pool.run(load, copy)


def test_a_torn_or_hostile_common_file_advises_nothing_unsafe(pool: Pool, copy: Path, tmp_path: Path) -> None:
    for content in (b"", b"torn", pickle.dumps(Payload(tmp_path / "ran"))):
        (copy / "common.pt").write_bytes(content)
        with pytest.raises(CheckpointError, match=r"common\.pt is damaged or not safe to open: \w") as caught:
            pool.run(load, copy)
        assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (EOFError(), "EOFError"),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598"), "may be full"),
        (ValueError("first.\nTraceback"), "first"),
        (ValueError("first. Second."), "first"),
    ],
)
def test_a_cause_is_never_empty(error: Exception, message: str) -> None:
    assert cause_of(error).endswith(message)


@pytest.mark.parametrize("stop", range(0, 100, 7))
def test_an_index_cut_anywhere_is_torn(pool: Pool, copy: Path, stop: int) -> None:
    from minitron_megatron.model.metadata import check_metadata

    index = copy / ".metadata"
    check_metadata(index)
    whole = index.read_bytes()
    index.write_bytes(whole[: len(whole) * stop // 100])
    with pytest.raises(CheckpointError, match=r"is damaged or not safe to open"):
        check_metadata(index)


# ---- hostile pickles


class Payload:
    """Object whose pickle creates a file when it is opened."""

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
    """torch unpickles any object that the index declares as bytes, so the index must not declare any."""
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
    write_checksums(copy / MANIFEST, (file for file in copy.iterdir() if file.name != MANIFEST))
    with pytest.raises(
        CheckpointError, match=rf"^checkpoint index {copy}/\.metadata is damaged or not safe to open: \w"
    ):
        pool.run(load, copy)
    assert not marker.exists()


def test_a_hostile_common_file_does_not_run(pool: Pool, copy: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save({"optimizer": Payload(marker)}, copy / "common.pt")
    with pytest.raises(CheckpointError, match=str(copy)):
        pool.run(load, copy)
    assert not marker.exists()
